"""veRL under a KL spec: the spec goes into ``kl_loss_type`` or ``algorithm.kl_penalty``, and nothing else changes.

veRL imports the plugin by itself, in every process, through the entry-point group ``verl.plugins``. ``attach`` is for
programs that switch entry points off; ``require_receipts`` for trainers of one's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kl_plugins.hosts import Finding
    from kl_plugins.receipts import Receipt

__all__ = ["attach", "detach", "diagnose", "require_receipts", "run"]


def attach() -> None:
    """Put the hooks into veRL, now where it is imported and later where it is not. Safe to call twice."""
    from kl_plugins.patches import verl

    verl.attach()


def detach() -> None:
    """Restore veRL's original functions. Safe to call twice. Specs then are unknown estimators."""
    from kl_plugins.patches import verl

    verl.detach()


def diagnose() -> Sequence[Finding]:
    """Version, source and entry-point findings for ``kl-plugins doctor``; reads veRL's files, imports nothing of it."""
    from kl_plugins.adapters.verl.diagnosis import diagnose

    return diagnose()


def run(module: str, argv: Sequence[str]) -> int:
    """Run one of veRL's programs under the plugin: ``kl-plugins run verl.trainer.main_ppo KEY=VALUE...``."""
    from kl_plugins.adapters.verl.program import run

    return run(module, argv)


def require_receipts(worker_group: Any, spec: str) -> list[Receipt]:
    """Ask every worker of a veRL worker group for its receipt, and let it train under the spec.

    veRL's own trainers do this before the first update; a trainer of one's own has to.

    Args:
        worker_group: a ``RayWorkerGroup`` whose workers have their loss function.
        spec: the ``@loss`` spec that they should run.

    Raises:
        MissingReceiptError: a worker gave none, or runs something else; it is named.
    """
    from kl_plugins.adapters.verl.receipts import collect
    from kl_plugins.spec import KLSpec

    return collect(worker_group, KLSpec.parse(spec))
