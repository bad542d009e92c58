"""Command line of the comparison: ``python -m benchmarks.hosts --python trl=PATH --python verl=PATH ...``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.command_line import console_of, typed
from benchmarks.drivers.launch import Hosts, over_hosts
from benchmarks.hosts import compare, report
from benchmarks.hosts.cases import BETA, NAMES, cases
from benchmarks.hosts.records import Record, load, write_cases
from benchmarks.hosts.reference import Oracle
from benchmarks.reporting import machine, write_json


def main(
    python: Annotated[list[str], typer.Option(help="HOST=PATH of the interpreter of a host's environment; repeat.")],
    out: Annotated[Path, typer.Option(help="Where JSON, plot and the workers' output go.")] = Path("out/bench/hosts"),
    smoke: Annotated[bool, typer.Option("--smoke", help="A few specs and settings; about two minutes.")] = False,
) -> None:
    """Run every host on the same rollouts, compare, print tables, write JSON and a plot; 1 if a spec is off."""
    console = console_of(150)
    with over_hosts(python, out) as hosts:
        found, versions = measure(hosts, smoke)
        result = compared(Oracle(hosts.folder), found, versions, hosts) if found else {}
    hosts.report(console)
    if not result:
        raise typer.Exit(1)
    for table in report.tables(result):
        console.print(table)
    for row in result["sixteen_bits"]:
        name = f"{NAMES[row['host']]} {row['case']}"
        console.print(f"{name}, all that it offers: {report.worst(row):.1e} from the core in float64")
    for row in result["processes"]:
        console.print(f"{NAMES[row['host']]} {row['case']}: {report.worst(row):.1e}")
    console.print(result["verdict"])
    write_json(
        out / "parity.json",
        {"machine": machine(), "command": typed("benchmarks.hosts"), **result},
    )
    report.plot(result, out / "parity.png")
    raise typer.Exit(0 if result["within_target"] else 1)


def measure(hosts: Hosts, smoke: bool) -> tuple[dict[str, list[Record]], dict[str, str]]:
    """Make the fixture, run the workers, and return records and versions by host."""
    hosts.prepare("benchmarks.hosts.fixture", hosts.folder, log="fixture.log")
    found, versions = {}, {}
    for host in hosts:
        listed, results = hosts.folder / f"{host}.json", hosts.folder / f"{host}.pt"
        write_cases(listed, cases(host, smoke))
        if hosts.run(host, f"benchmarks.hosts.{host}_update", hosts.folder, listed, results):
            _, versions[host], found[host] = load(results)
    return found, versions


def compared(oracle: Oracle, found: dict[str, list[Record]], versions: dict[str, str], hosts: Hosts) -> dict[str, Any]:
    """Return all results that are reported."""
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
        "within_target": not beyond and not hosts.failed,
        "failed": hosts.failed,
        "verdict": verdict + (f"; beyond it: {', '.join(beyond)}" if beyond else "") + hosts.without(),
        "parity": parity,
        "portable_beta": compare.portable_beta(oracle, found),
        "sixteen_bits": compare.otherwise(oracle, found, "dtype"),
        "processes": processes,
        "native": compare.native(oracle, found),
    }


if __name__ == "__main__":
    typer.run(main)
