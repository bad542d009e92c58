"""TRL under a KL spec: GRPO and RLOO with one new field, ``kl``.

``GRPOConfig``, ``GRPOTrainer``, ``RLOOConfig`` and ``RLOOTrainer`` are TRL's own classes with that field and the hooks
behind it; TRL's own stay as they are. A config with a spec cannot be given to a trainer without the hooks, which would
ignore it. ``attach`` gives the field and the hooks to TRL's classes in place, for code that keeps its own imports.
Nothing of TRL or torch is imported before it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kl_plugins.hosts import Finding
    from kl_plugins.patches.trl.classes import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

__all__ = ["GRPOConfig", "GRPOTrainer", "RLOOConfig", "RLOOTrainer", "attach", "detach", "diagnose", "run"]

_CLASSES = ("GRPOConfig", "GRPOTrainer", "RLOOConfig", "RLOOTrainer")


def attach() -> None:
    """Give TRL's own GRPO and RLOO classes the ``kl`` field and the hooks, in place. Safe to call twice.

    Call it before a config class of your own is derived from TRL's: a dataclass does not pass on later fields.

    Raises:
        UnsupportedHostError: this TRL is not one that kl-plugins was checked with, or Unsloth has rewritten it.
    """
    from kl_plugins.patches import trl

    trl.attach()


def detach() -> None:
    """Restore TRL's original objects. Safe to call twice. Trainers built under a spec stop regularising."""
    from kl_plugins.patches import trl

    trl.detach()


def diagnose() -> Sequence[Finding]:
    """Version and source findings for ``kl-plugins doctor``; reads TRL's files, imports nothing of it."""
    from kl_plugins.adapters.trl.diagnosis import diagnose

    return diagnose()


def run(module: str, argv: Sequence[str]) -> int:
    """Run one of TRL's training scripts under the plugin: ``kl-plugins run trl grpo --config x.yaml --kl SPEC``."""
    from kl_plugins.adapters.trl.cli import run

    return run(module, argv)


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        from kl_plugins.patches.trl import classes

        return getattr(classes, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
