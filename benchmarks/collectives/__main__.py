"""Command line: ``python -m benchmarks.collectives --python trl=PATH --python verl=PATH --python openrlhf=PATH``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.collectives import report
from benchmarks.collectives.plan import MICRO_BATCHES, PROCESSES
from benchmarks.command_line import console_of, typed
from benchmarks.drivers.launch import Hosts, over_hosts
from benchmarks.hosts.cases import NAMES
from benchmarks.reporting import machine, write_json


def main(
    python: Annotated[list[str], typer.Option(help="HOST=PATH of the interpreter of a host's environment; repeat.")],
    out: Annotated[Path, typer.Option(help="Where JSON, plot and workers' output go.")] = Path("out/bench/collectives"),
    processes: Annotated[str, typer.Option(help="Comma-separated numbers of processes.")] = "1,2,4",
    smoke: Annotated[bool, typer.Option("--smoke", help="One and two processes.")] = False,
) -> None:
    """Count in real runs, compare with the model on paper, print, write JSON and a plot; 1 if they differ."""
    console = console_of(150)
    ranks = list(PROCESSES[:2]) if smoke else [int(number) for number in processes.split(",")]
    rows: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    with over_hosts(python, out) as hosts:
        for host in hosts:
            count(hosts, host, ranks)
            for number in ranks:
                counted = hosts.folder / f"{host}-{number}.json"
                if counted.exists():
                    found = json.loads(counted.read_text())
                    versions[host] = found["version"]
                    rows += report.rows(host, number, found["arms"])
    model = report.scaling(list(hosts.environments))
    hosts.report(console)
    console.print(report.table(rows))
    console.print("\n".join(report.FORMULAS), highlight=False)
    console.print(report.scaling_table(model))
    wrong = [f"{NAMES[one['host']]} {one['spec']} in {one['ranks']}" for one in rows if not one["agrees"]]
    verdict = f"counted and on paper differ: {', '.join(wrong)}" if wrong else "every count is the one on paper"
    verdict += hosts.without()
    console.print(verdict)
    about: dict[str, Any] = {"machine": machine(), "command": typed("benchmarks.collectives")}
    about |= {"versions": versions, "micro_batches": MICRO_BATCHES, "verdict": verdict}
    about |= {"agrees": not wrong and not hosts.failed, "failed": hosts.failed}
    write_json(out / "collectives.json", {**about, "rows": rows, "formulas": report.FORMULAS, "model": model})
    report.plot(rows, model, out / "collectives.png")
    raise typer.Exit(1 if wrong or hosts.failed else 0)


def count(hosts: Hosts, host: str, ranks: list[int]) -> None:
    """Run one host's program, which writes its JSON files into the folder. If it fails, some files are missing."""
    if host != "trl":
        hosts.run(host, f"benchmarks.collectives.{host}_run", hosts.folder, *map(str, ranks))
        return
    for number in ranks:
        launch = ["--standalone", f"--nproc_per_node={number}", "-m", "benchmarks.collectives.trl_run"]
        hosts.run(host, "torch.distributed.run", *launch, hosts.folder, log=f"trl-{number}.log")


if __name__ == "__main__":
    typer.run(main)
