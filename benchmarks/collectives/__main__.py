"""Command line: ``python -m benchmarks.collectives --python trl=PATH --python verl=PATH --python openrlhf=PATH``."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.collectives import report
from benchmarks.collectives.plan import MICRO_BATCHES, PROCESSES
from benchmarks.drivers import launch as run
from benchmarks.hosts.report import NAMES
from benchmarks.reporting import machine, write_json


def main(
    python: Annotated[list[str], typer.Option(help="HOST=PATH of the interpreter of a host's environment; repeat.")],
    out: Annotated[Path, typer.Option(help="Where JSON, plot and workers' output go.")] = Path("out/bench/collectives"),
    processes: Annotated[str, typer.Option(help="Comma-separated numbers of processes.")] = "1,2,4",
    smoke: Annotated[bool, typer.Option("--smoke", help="One and two processes.")] = False,
) -> None:
    """Count in real runs, compare with the model on paper, print, write JSON and a plot; 1 if they differ."""
    console, environments = Console(), run.interpreters(python)
    console = console if console.is_terminal else Console(width=150)
    ranks = list(PROCESSES[:2]) if smoke else [int(number) for number in processes.split(",")]
    rows: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="klp") as name, Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(environments))
        for host, path in environments.items():
            progress.update(task, description=NAMES[host])
            count(host, path, Path(name), ranks, out / f"{host}.log", failed)
            for number in ranks:
                counted = Path(name) / f"{host}-{number}.json"
                if counted.exists():
                    found = json.loads(counted.read_text())
                    versions[host] = found["version"]
                    rows += report.rows(host, number, found["arms"])
            progress.update(task, advance=1)
    model = report.scaling(list(environments))
    for text in failed.values():
        console.print(text, highlight=False, markup=False)
    console.print(report.table(rows))
    console.print("\n".join(report.FORMULAS), highlight=False)
    console.print(report.scaling_table(model))
    wrong = [f"{NAMES[one['host']]} {one['spec']} in {one['ranks']}" for one in rows if not one["agrees"]]
    verdict = f"counted and on paper differ: {', '.join(wrong)}" if wrong else "every count is the one on paper"
    verdict += run.without(failed)
    console.print(verdict)
    about: dict[str, Any] = {"machine": machine(), "command": run.command("benchmarks.collectives")}
    about |= {"versions": versions, "micro_batches": MICRO_BATCHES, "verdict": verdict}
    about |= {"agrees": not wrong and not failed, "failed": failed}
    write_json(out / "collectives.json", {**about, "rows": rows, "formulas": report.FORMULAS, "model": model})
    report.plot(rows, model, out / "collectives.png")
    raise typer.Exit(1 if wrong or failed else 0)


def count(host: str, python: str, folder: Path, ranks: list[int], log: Path, failed: dict[str, str]) -> None:
    """Run one host's program; its JSON files lie in the folder afterwards, as far as it came."""
    if host != "trl":
        numbers = map(str, ranks)
        run.survived(failed, host, f"benchmarks.collectives.{host}_run", folder, *numbers, python=python, log=log)
        return
    for number in ranks:
        launch = ["--standalone", f"--nproc_per_node={number}", "-m", "benchmarks.collectives.trl_run"]
        own = log.with_name(f"trl-{number}.log")
        run.survived(failed, host, "torch.distributed.run", *launch, folder, python=python, log=own)


if __name__ == "__main__":
    typer.run(main)
