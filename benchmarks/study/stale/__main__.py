"""`python -m benchmarks.study.stale` chooses the default KL spec for stale rollouts."""

from __future__ import annotations

import os
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.command_line import console_of, interruptible, typed
from benchmarks.reporting import machine, write_json
from benchmarks.study.comparison import Options
from benchmarks.workers import cores

from . import arms, rules, runs, summary

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
    top_k: Annotated[bool, typer.Option("--top-k", help="Run only the arms with top:<k> and their partners.")] = False,
) -> None:
    """Choose the default spec by the rules in `rules.py`; finished runs are kept and skipped."""
    console, command = console_of(180), typed("benchmarks.study.stale")
    options = Options(seeds, out, workers or cores(), dry=dry_run, command=command, judge_only=judge_only)
    with interruptible(console):
        if top_k:
            study_top_k(console, options)
        else:
            study(console, options, confirm, selection_only)


def study(console: Console, options: Options, confirm: str = "", selection_only: bool = False) -> None:
    """Run the selection, choose a spec, confirm it, run the arms that are only reported, and write the results.

    Args:
        console: the console that receives the output.
        options: options of the study.
        confirm: the spec to confirm. If it is empty, the chosen spec is confirmed.
        selection_only: whether to leave the confirmation out.
    """
    beta = arms.FAST.beta
    candidates, reported = arms.selection()
    found = runs.records(console, [candidates], options)
    if options.dry and not found:
        console.print("The confirmation's runs depend on the choice; this is their cost, were it today's default:")
    selected = rules.outcomes(found, beta)
    chosen = confirm or (rules.choose(selected) if rules.order(selected) else rules.second_choice(selected))
    chosen = chosen or rules.choose(selected)
    console.print(f"candidates that reach a level, the default first: {rules.order(selected)}")
    elsewhere: runs.Found = {}
    if not selection_only:
        batches = arms.confirmation(chosen)
        elsewhere = runs.records(console, batches, options)
    found |= runs.records(console, [reported], options)
    if options.dry:
        return
    write(console, options, chosen, found, elsewhere)


def study_top_k(console: Console, options: Options) -> None:
    """Run the arms with `top:<k>` and the arms that they are compared with, judge them, and write `stale-top-k.json`.

    Args:
        console: the console that receives the output.
        options: options of the study.
    """
    beta = arms.FAST.beta
    found = runs.records(console, [arms.top_k()], options)
    if options.dry:
        return
    known = rules.outcomes(found, beta)
    data = {**about(options), "holds": rules.top_k_holds(known), "runs": summary.part(found, known, beta)}
    write_json(options.folder / "stale-top-k.json", data)
    console.print(summary.places_table(data["runs"], "top:<k>: every place"))
    console.print(summary.totals_table(data["runs"], "top:<k>: runs on stale data"))
    for arm, holds in data["holds"].items():
        console.print(f"{arm}: {'stable' if holds else 'NOT stable'}, by the rule", style="bold", highlight=False)
    console.print(f"Written: {options.folder / 'stale-top-k.json'}")


def about(options: Options) -> dict[str, Any]:
    """Return what a result says about its command, machine, versions and settings."""
    return {
        "command": options.command,
        "machine": machine(),
        "versions": {name: version(name) for name in ("kl-plugins", "trl", "transformers", "torch")},
        "settings": [asdict(arms.FAST), asdict(arms.SLOW)],
    }


def write(console: Console, options: Options, chosen: str, found: runs.Found, elsewhere: runs.Found) -> None:
    """Judge the runs, print the results, and write `stale.json` and its plot.

    Args:
        console: the console that receives the output.
        options: options of the study.
        chosen: the spec that was confirmed.
        found: records of the selection and of the arms that are only reported.
        elsewhere: records of the confirmation.
    """
    beta = arms.FAST.beta
    # A place of the confirmation that has no runs with fresh data uses those of the selection.
    fresh = {key: record for key, record in found.items() if key[0].delay == 0}
    again = [o for o in rules.outcomes(fresh | elsewhere, beta) if (o.place, o.arm, o.seed) in elsewhere]
    data = {
        **about(options),
        "rules": {"from": rules.FROM, "kept": rules.KEPT, "margin": rules.MARGIN, "levels": rules.LEVELS},
        "verdict": summary.verdict(rules.outcomes(found, beta), again, chosen),
        "selection": summary.part(found, rules.outcomes(found, beta), beta),
        "confirmation": summary.part(elsewhere, again, beta),
        "run_seconds": [round(record["seconds"], 1) for record in (*found.values(), *elsewhere.values())],
    }
    write_json(options.folder / "stale.json", data)
    for name in ("selection", "confirmation"):
        if data[name]["rows"]:
            console.print(summary.places_table(data[name], f"{name}: every place"))
            console.print(summary.totals_table(data[name], f"{name}: runs on stale data"))
    console.print(data["verdict"]["sentence"], style="bold", highlight=False)
    if find_spec("matplotlib") is not None:
        from . import plot

        plot.draw(options.folder / "stale.png", data)
    console.print(f"Written: {options.folder / 'stale.json'}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    app()
