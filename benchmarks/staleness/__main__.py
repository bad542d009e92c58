"""The command ``python -m benchmarks.staleness``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.command_line import console_of, typed
from benchmarks.reporting import machine, write_json
from benchmarks.staleness import forces
from benchmarks.staleness.findings import LIMITS, findings, shown
from benchmarks.staleness.outcomes import ARMS, Sweep, courses, measure, sweeps
from benchmarks.staleness.plot import plot, plot_checks

SMOKE_RUNS = 8


def measured(found: Mapping[str, Sweep], console: Console) -> dict[str, Any]:
    """Run all sweeps, and record the main setting over time with noise and without."""
    known: dict[Any, dict[str, Any]] = {}
    results = {}
    with Progress(console=console) as progress:
        task = progress.add_task("runs", total=1 + sum(len(sweep.values) for sweep in found.values()))
        for name, sweep in found.items():
            progress.update(task, description=name)
            results[name] = {**sweep.described(), "rows": measure(sweep, known, lambda: progress.advance(task))}
        setting = found["noise, delay"].base
        with_noise, without = courses(setting), courses(replace(setting, samples=0, noise=0.0))
        progress.advance(task)
    return {"sweeps": results, "courses": {"with noise": with_noise, "without noise": without}}


def table(sweep: Mapping[str, Any]) -> Table:
    """Make a table of the share of runs that ran away and of the median KL at the end, by arm and value."""
    base = sweep["base"]
    optimizer = f"{base['optimizer']} {base['rate']:g}, {base['samples']} drawn per update"
    noise = f"advantages of deviation {base['noise']:g}" if base["noise"] else "no policy gradient"
    made = Table(title=f"{sweep['title']} ({optimizer}, {noise})")
    made.add_column("term", no_wrap=True)
    for value in sweep["values"]:
        made.add_column(f"{value:g}", justify="right", no_wrap=True)
    for arm in ARMS:
        mine = {row["value"]: row for row in sweep["rows"] if row["arm"] == arm}
        cells = (f"{shown(mine[value])} {mine[value]['final_kl']['median']:.2f}" for value in sweep["values"])
        made.add_row(arm, *cells)
    return made


def main(
    out: Annotated[Path, typer.Option(help="Folder for staleness.json and the figures.")] = Path("out/bench/staleness"),
    runs: Annotated[int, typer.Option(help="Independent runs of every arm and setting.", min=2)] = 512,
    seed: Annotated[int, typer.Option(help="Seed of references, starts and draws.", min=0)] = 0,
    smoke: Annotated[bool, typer.Option("--smoke", help="Only test that it runs, with few and short runs.")] = False,
    redraw: Annotated[bool, typer.Option("--redraw", help="Print and draw from the staleness.json in --out.")] = False,
) -> None:
    """Show in one state why an importance-weighted KL can run away on stale data, and what prevents it."""
    torch.set_num_threads(1)
    console = console_of(190)
    ratio = forces.grid()
    curves = list(forces.curves(ratio))
    if redraw:
        data = json.loads((out / "staleness.json").read_text())
    else:
        found = sweeps(SMOKE_RUNS if smoke else runs, seed, smoke)
        data = {
            "machine": machine(),
            "command": typed("benchmarks.staleness"),
            "smoke": smoke,
            **measured(found, Console(stderr=True)),
        }
    data["forces"], data["refused"] = [curve.summary(ratio) for curve in curves], forces.refused()
    said = findings({name: sweep["rows"] for name, sweep in data["sweeps"].items()}, data["forces"])
    data |= {"findings": said, "limits": list(LIMITS)}
    data["verdict"] = " ".join(one["says"] for one in said if one["name"] in ("noise", "noise, medians"))
    for name in ("noise, delay", "adam, delay"):
        console.print(table(data["sweeps"][name]))
    console.print("tables: share of runs that ran away (95 % interval by Wilson), and median KL at the end in nats")
    for text in (*(one["says"] for one in said), *LIMITS):
        console.print(f"- {text}", highlight=False)
    if data["smoke"]:
        console.print("These numbers are from a smoke run: they mean nothing.")
    write_json(out / "staleness.json", data)
    plot(out / "staleness.png", ratio, curves, data)
    plot_checks(out / "staleness-checks.png", ratio, curves, data)
    console.print(f"wrote {out / 'staleness.json'}, {out / 'staleness.png'} and {out / 'staleness-checks.png'}")


if __name__ == "__main__":
    typer.run(main)
