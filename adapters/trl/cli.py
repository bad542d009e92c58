"""TRL's training scripts, run in this process with the hooks in and TRL's own parser."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

SCRIPTS = ("grpo", "rloo")
"""Scripts whose trainers have the seams."""


def run(module: str, argv: Sequence[str]) -> int:
    """Run ``trl grpo`` or ``trl rloo`` under the plugin; works under ``torchrun`` and ``accelerate launch`` as well.

    Args:
        module: ``trl`` (the script is then the first argument) or ``trl.scripts.grpo``.
        argv: the script's arguments: TRL's own, and ``--kl SPEC``.

    Returns:
        Exit status.

    Raises:
        ValueError: a key in the YAML file or an argument that TRL does not know.
    """
    arguments = list(argv)
    name = (
        module.removeprefix("trl.scripts.")
        if module.startswith("trl.scripts.")
        else (arguments.pop(0) if arguments else "")
    )
    if name not in SCRIPTS:
        print(
            f"kl-plugins: {name or 'no script'!r}: the TRL scripts with a KL seam are {' and '.join(SCRIPTS)}, "
            "for example: kl-plugins run trl grpo --config x.yaml --kl default",
            file=sys.stderr,
        )
        return 2
    from kl_plugins.patches import trl

    trl.attach()
    script = importlib.import_module(f"trl.scripts.{name}")
    # Usage and errors then name the command that was typed.
    sys.argv = [f"kl-plugins run trl {name}", *arguments]
    parser = script.make_parser()
    # TRL's default for scripts is to drop what it does not know; here a misspelt key must not train without it.
    script.main(*parser.parse_args_and_config(args=arguments, fail_with_unknown_args=True))
    _end_process_group()
    return 0


def _end_process_group() -> None:
    # TRL's scripts leave it to the end of the process, which then aborts more often than not (gloo, torch 2.13).
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
