"""`python -m benchmarks.study.stale`: choose the default spec where rollouts are stale."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.demo.workers import cores, failures_reported
from benchmarks.study.comparison import Options

from . import arms, rules, runs

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    seeds: Annotated[int, typer.Option(min=1, help="Most seeds per cell.")] = arms.SEEDS,
    selection_only: Annotated[bool, typer.Option(help="Choose, and do not confirm.")] = False,
    confirm: Annotated[str, typer.Option(help="Confirm this spec in place of the chosen one.")] = "",
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: one per core.")] = 0,
    out: Annotated[Path, typer.Option(help="Output folder; runs are shared with the study.")] = Path("out/bench/study"),
    dry_run: Annotated[bool, typer.Option(help="Say what would be run and what it costs.")] = False,
    judge_only: Annotated[bool, typer.Option(help="Make no runs; judge those that are there.")] = False,
) -> None:
    """Choose the default spec by the rules in `rules.py`; finished runs are kept and skipped."""
    console = Console()
    console = console if console.is_terminal else Console(width=150)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the workers as on Ctrl-C
    command = shlex.join(["python", "-m", "benchmarks.study.stale", *sys.argv[1:]])
    options = Options(seeds, out, workers or cores(), dry=dry_run, command=command, judge_only=judge_only)
    beta = arms.FAST.beta
    with failures_reported(console):
        candidates, reported = arms.selection()
        selected = rules.outcomes(runs.records(console, [candidates], options), beta)
        chosen = confirm or rules.choose(selected)
        console.print(f"chosen: {chosen}; candidates by level and bias: {rules.order(selected)}")
        again: list[rules.Outcome] = []
        if not selection_only:
            places = arms.confirmation(chosen)
            found = runs.records(console, places, options)
            # A place that lacks its own runs on fresh data has them among those of the selection.
            found |= runs.records(console, [candidates], replace(options, judge_only=True))
            known = {place for batch in places for place in batch.places}
            again = [outcome for outcome in rules.outcomes(found, beta) if outcome.place in known]
            console.print(f"confirmed: {rules.confirmed(chosen, selected, again)}")
        runs.records(console, [reported], options)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    app()
