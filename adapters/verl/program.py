"""veRL's programs, run in this process with the hooks in."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence


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
    sys.argv = [module, *argv]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    return 0
