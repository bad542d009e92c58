"""Command line of the comparison: ``python -m benchmarks.hosts --python trl=PATH --python verl=PATH ...``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.drivers import launch as run
from benchmarks.hosts import compare, report
from benchmarks.hosts.cases import BETA, cases
from benchmarks.hosts.records import Record, load, write_cases
from benchmarks.hosts.reference import Oracle
from benchmarks.reporting import machine, write_json


def main(
    python: Annotated[list[str], typer.Option(help="HOST=PATH of the interpreter of a host's environment; repeat.")],
    out: Annotated[Path, typer.Option(help="Where JSON, plot and the workers' output go.")] = Path("out/bench/hosts"),
    smoke: Annotated[bool, typer.Option("--smoke", help="A few specs and settings; about two minutes.")] = False,
) -> None:
    """Run every host on the same rollouts, compare, print tables, write JSON and a plot; 1 if a spec is off."""
    environments, console = run.interpreters(python), Console()
    console = console if console.is_terminal else Console(width=150)
    with tempfile.TemporaryDirectory(prefix="klp") as folder, Progress(console=Console(stderr=True)) as progress:
        failed: dict[str, str] = {}
        found, versions = measure(environments, Path(folder), out, smoke, progress, failed)
        result = compared(Oracle(Path(folder)), found, versions, failed) if found else {}
    for text in failed.values():
        console.print(text, highlight=False, markup=False)
    if not result:
        raise typer.Exit(1)
    for table in report.tables(result):
        console.print(table)
    for row in result["sixteen_bits"]:
        name = f"{report.NAMES[row['host']]} {row['case']}"
        console.print(f"{name}, all that it offers: {report.worst(row):.1e} from the core in float64")
    for row in result["processes"]:
        console.print(f"{report.NAMES[row['host']]} {row['case']}: {report.worst(row):.1e}")
    console.print(result["verdict"])
    write_json(
        out / "parity.json",
        {"machine": machine(), "command": run.command("benchmarks.hosts"), **result},
    )
    report.plot(result, out / "parity.png")
    raise typer.Exit(0 if result["within_target"] else 1)


def measure(
    environments: dict[str, str], folder: Path, out: Path, smoke: bool, progress: Progress, failed: dict[str, str]
) -> tuple[dict[str, list[Record]], dict[str, str]]:
    """Make the fixture, run the workers; records and versions by host, and who failed."""
    task = progress.add_task("rollouts", total=1 + len(environments))
    run.run_module(next(iter(environments.values())), "benchmarks.hosts.fixture", folder, log=out / "fixture.log")
    found, versions = {}, {}
    for host, path in environments.items():
        progress.update(task, advance=1, description=report.NAMES[host])
        listed, results = folder / f"{host}.json", folder / f"{host}.pt"
        write_cases(listed, cases(host, smoke))
        module, log = f"benchmarks.hosts.{host}_update", out / f"{host}.log"
        if run.survived(failed, host, module, folder, listed, results, python=path, log=log):
            _, versions[host], found[host] = load(results)
    progress.update(task, advance=1)
    return found, versions


def compared(
    oracle: Oracle, found: dict[str, list[Record]], versions: dict[str, str], failed: dict[str, str]
) -> dict[str, Any]:
    """Everything that is reported."""
    parity, processes = compare.parity(oracle, found), compare.otherwise(oracle, found, "ranks")
    largest = max(report.worst(row) for row in parity + processes)
    beyond = [f"{row['case']} in {row['host']}" for row in parity + processes if report.worst(row) > compare.EQUAL]
    verdict = f"largest relative difference to the core: {largest:.1e} (target {compare.EQUAL:g})"
    return {
        "versions": versions,
        "beta": BETA,
        "tokens": sum(oracle.lengths),
        "sequences": len(oracle.lengths),
        "largest": largest,
        "within_target": not beyond and not failed,
        "failed": failed,
        "verdict": verdict + (f"; beyond it: {', '.join(beyond)}" if beyond else "") + run.without(failed),
        "parity": parity,
        "portable_beta": compare.portable_beta(oracle, found),
        "sixteen_bits": compare.otherwise(oracle, found, "dtype"),
        "processes": processes,
        "native": compare.native(oracle, found),
    }


if __name__ == "__main__":
    typer.run(main)
