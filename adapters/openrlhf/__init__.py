"""OpenRLHF under a KL spec: the spec goes into ``--algo.kl.estimator``, and nothing else changes.

``kl-plugins run openrlhf.cli.train_ppo_ray ...`` puts the hooks into the launching process and, through Ray, into every
worker. ``attach`` is what Ray calls there; ``require_receipts`` is for trainers of one's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kl_plugins.hosts import Finding
    from kl_plugins.receipts import Receipt

__all__ = ["attach", "detach", "diagnose", "require_receipts", "run"]


def attach() -> None:
    """Put the hooks into OpenRLHF, now where it is imported and later where it is not. Safe to call twice."""
    from kl_plugins.patches import openrlhf

    openrlhf.attach()


def detach() -> None:
    """Restore OpenRLHF's original functions. Safe to call twice. Specs then are unknown estimators."""
    from kl_plugins.patches import openrlhf

    openrlhf.detach()


def diagnose() -> Sequence[Finding]:
    """Version and source findings for ``kl-plugins doctor``; reads OpenRLHF's files, imports nothing of it."""
    from kl_plugins.adapters.openrlhf.diagnosis import diagnose

    return diagnose()


def run(module: str, argv: Sequence[str]) -> int:
    """Run one of OpenRLHF's programs under the plugin: ``kl-plugins run openrlhf.cli.train_ppo_ray ...``."""
    from kl_plugins.adapters.openrlhf.program import run

    return run(module, argv)


def require_receipts(actor_group: Any, args: Any) -> list[Receipt]:
    """Ask every policy worker for its receipt, and let it train under the ``@loss`` spec of the arguments.

    OpenRLHF's own trainers do this before the first rollout; a trainer of one's own has to.

    Args:
        actor_group: a ``RayActorGroup`` of policy workers that have their model.
        args: OpenRLHF's nested arguments.

    Returns:
        One receipt per worker; none where the arguments ask for no ``@loss`` spec.

    Raises:
        MissingReceiptError: a worker gave none, or runs something else; it is named.
    """
    from kl_plugins.adapters.openrlhf.receipts import collect
    from kl_plugins.adapters.openrlhf.settings import spec_of

    spec = spec_of(args)
    return collect(actor_group, spec, args) if spec is not None and spec.placement == "loss" else []
