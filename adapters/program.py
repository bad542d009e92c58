"""A module of a host run in this process, as ``python -m`` would."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence


def run_module(module: str, argv: Sequence[str]) -> int:
    """Run a module as ``__main__``.

    Args:
        module: its dotted name.
        argv: its arguments.

    Returns:
        Exit status; what the module raises passes through.
    """
    sys.argv = [module, *argv]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    return 0
