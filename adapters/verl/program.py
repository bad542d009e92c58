"""veRL's programs, run in this process with the hooks in."""

from __future__ import annotations

from collections.abc import Sequence

from kl_plugins.adapters.program import run_module


def run(module: str, argv: Sequence[str]) -> int:
    """Run a module of veRL as ``python -m`` does, with the hooks in even where entry points are switched off.

    Workers get the hooks through veRL's entry point, as always.

    Args:
        module: for example ``verl.trainer.main_ppo``.
        argv: its arguments: veRL's own Hydra overrides.

    Returns:
        Exit status.
    """
    from kl_plugins.patches import verl

    verl.attach()
    return run_module(module, argv)
