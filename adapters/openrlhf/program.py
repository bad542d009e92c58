"""OpenRLHF's programs, run in this process with the hooks in, and in every Ray worker of their job."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from kl_plugins.adapters.openrlhf.ray_job import VARIABLE, with_hook
from kl_plugins.adapters.program import run_module


def run(module: str, argv: Sequence[str]) -> int:
    """Run a module of OpenRLHF as ``python -m`` does.

    Args:
        module: for example ``openrlhf.cli.train_ppo_ray``.
        argv: its arguments: OpenRLHF's own flags.

    Returns:
        Exit status.

    Raises:
        ValueError: the Ray job has a setup hook of its own.
    """
    if "." not in module:
        print(
            f"kl-plugins: {module!r} is no program; for example: kl-plugins run openrlhf.cli.train_ppo_ray "
            "--algo.kl.estimator k2@loss/is:token --algo.kl.use_loss ...",
            file=sys.stderr,
        )
        return 2
    from kl_plugins.patches import openrlhf
    from kl_plugins.patches.openrlhf.cli import extended_flag

    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = with_hook(os.environ)
    openrlhf.attach()
    try:
        with extended_flag():
            return run_module(module, argv)
    finally:
        os.environ.pop(VARIABLE) if before is None else os.environ.update({VARIABLE: before})
