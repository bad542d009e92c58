"""`python -m benchmarks.study`: test published claims about KL regularisers in real RL runs on small models."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.command_line import console_of, interruptible, listed, typed
from benchmarks.demo.arms import find_arm
from benchmarks.workers import cores

from .comparison import Options, study
from .plan import Scope
from .settings import DELAYS, FAMILIES, SIZES, Settings
from .tasks import TASKS

SMOKE = Settings(steps=4, evaluate_every=2, pretrain_steps=300, prompts=4, generations=4)
SMOKE_SCOPE = Scope(
    tasks=("rare",),
    claims=("k1-loss-like-none", "k1-reward-stable", "stale-naive-worse", "precision-weight", "exact-same-end"),
)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    tasks: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(TASKS)}; all by default.")] = "",
    families: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(FAMILIES)}.")] = ",".join(FAMILIES),
    arms: Annotated[str, typer.Option(help="Comma-separated: none, or KL specs; all by default.")] = "",
    delays: Annotated[str, typer.Option(help="Comma-separated sampler delays, in updates; all by default.")] = "",
    claims: Annotated[str, typer.Option(help="Comma-separated names of claims: their runs alone.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds per cell.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps per run.")] = Settings.steps,
    beta: Annotated[float, typer.Option(help="Coefficient of the KL, the same in every arm.")] = Settings.beta,
    learning_rate: Annotated[float, typer.Option(help="Of the RL runs.")] = Settings.learning_rate,
    pretrain_rate: Annotated[float, typer.Option(help="Of the references.")] = Settings.pretrain_rate,
    generations: Annotated[int, typer.Option(min=2, help="Completions per prompt.")] = Settings.generations,
    optimizer: Annotated[str, typer.Option(help="adamw, or sgd in TRL.")] = Settings.optimizer,
    max_grad_norm: Annotated[float, typer.Option(help="Larger ones are scaled down.")] = Settings.max_grad_norm,
    host: Annotated[str, typer.Option(help="Framework that trains.")] = "trl",
    size: Annotated[str, typer.Option(help=f"Of models made here: {', '.join(SIZES)}.")] = "tiny",
    model: Annotated[str, typer.Option(help="A local path or hub name instead; measured from samples.")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: one per core, or one on a GPU.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Output folder; out/bench/study by default.")] = None,
    fresh: Annotated[bool, typer.Option(help="Repeat runs that are finished.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Say what would be run and what it costs.")] = False,
    judge_only: Annotated[bool, typer.Option(help="Make no runs; judge those that are there.")] = False,
    smoke: Annotated[bool, typer.Option(help="2 seeds of 4 steps, a few claims: does everything run?")] = False,
) -> None:
    """Test published claims about KL regularisers in real RL runs; finished runs are kept and skipped."""
    console = console_of(150)
    try:
        names = tuple("none" if n == "none" else find_arm(n).name for n in _names(arms))
        # A model that was given has a family of its own.
        kinds = ("given",) if model else _known("family", _names(families), FAMILIES)
        scope = Scope(_known("task", _names(tasks), tuple(TASKS)), kinds, names, _delays(delays), _names(claims), host)
        _known("size", (size,), tuple(SIZES))
        settings = Settings(
            steps=steps,
            beta=beta,
            learning_rate=learning_rate,
            pretrain_rate=pretrain_rate,
            generations=generations,
            optimizer=optimizer,
            max_grad_norm=max_grad_norm,
            size=size,
            model=model,
            device=device,
        )
        if smoke:
            settings = replace(SMOKE, size=size, model=model, device=device)
            scope = replace(SMOKE_SCOPE, families=kinds, host=host)
        options = Options(
            2 if smoke else seeds,
            out or Path("out/bench") / ("study-smoke" if smoke else "study"),
            workers or (1 if device != "cpu" else cores()),
            fresh,
            dry_run,
            typed("benchmarks.study"),
            smoke,
            judge_only,
        )
        with interruptible(console):
            study(console, scope, settings, options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _names(text: str) -> tuple[str, ...]:
    return tuple(listed(text, str, optional=True))


def _known(kind: str, names: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in known:
            raise ValueError(f"no {kind} {name!r}; there is {', '.join(known)}")
    return names


def _delays(text: str) -> tuple[int, ...]:
    return tuple(int(d) for d in _known("delay", _names(text), tuple(map(str, DELAYS))))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    app()
