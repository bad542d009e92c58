"""The command `python -m benchmarks.demo`: trains a tiny model under five KL regularisers and draws the results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.command_line import interruptible, listed
from benchmarks.workers import cores

from .arms import ARMS, Settings, find_arm
from .compare import compare

SMOKE = Settings(steps=4, evaluate_every=4, pretrain_steps=150)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    arms: Annotated[str, typer.Option(help="Comma-separated: none, native-k3, or KL specs.")] = ",".join(
        a.name for a in ARMS
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds; they are 1, 2, ...")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps per run.")] = Settings.steps,
    out: Annotated[Path | None, typer.Option(help="Output folder; out/demo, or out/demo-smoke with --smoke.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: one per core.")] = 0,
    fresh: Annotated[bool, typer.Option(help="Repeat runs that are finished.")] = False,
    smoke: Annotated[bool, typer.Option(help="Only test that everything runs, with a few steps of one seed.")] = False,
) -> None:
    """Train a tiny model with TRL's GRPO under several KL regularisers and compare them by exact enumeration."""
    chosen = listed(arms, find_arm)
    settings = SMOKE if smoke else Settings(steps=steps)
    folder = out or Path("out") / ("demo-smoke" if smoke else "demo")
    console = Console()
    with interruptible(console):
        compare(console, chosen, 1 if smoke else seeds, settings, folder, workers or cores(), fresh)


if __name__ == "__main__":
    app()
