"""Command line: ``python -m benchmarks.overhead --python trl=PATH --python verl=PATH --python openrlhf=PATH``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.command_line import console_of, typed
from benchmarks.drivers.launch import over_hosts
from benchmarks.hosts.cases import NAMES
from benchmarks.overhead.measure import UNDECIDED, Block, summary
from benchmarks.overhead.plan import PAIRS, SMOKE, Plan, Size
from benchmarks.overhead.report import plot, table
from benchmarks.reporting import machine, write_json


def main(
    python: Annotated[list[str], typer.Option(help="HOST=PATH of the interpreter of a host's environment; repeat.")],
    out: Annotated[Path, typer.Option(help="Where JSON, plot and output of workers go.")] = Path("out/bench/overhead"),
    only: Annotated[str, typer.Option(help="Measure only the pairs whose spec contains this text.")] = "",
    smoke: Annotated[bool, typer.Option("--smoke", help="A tiny model, few steps: that it runs, no numbers.")] = False,
    rounds: Annotated[int, typer.Option(min=3, help="Blocks of each arm.")] = 9,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of a block.")] = 3,
    loaded: Annotated[bool, typer.Option("--loaded", help="Keep both arms in memory; not for TRL.")] = False,
    hidden: Annotated[int, typer.Option(help="Width of the model; a multiple of 32.")] = Size.hidden,
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = Size.layers,
    vocabulary: Annotated[int, typer.Option(help="Tokens of the vocabulary.")] = Size.vocabulary,
    response: Annotated[int, typer.Option(help="Longest response, tokens.")] = Size.response,
    limit: Annotated[float, typer.Option(help="Seconds that one host may take.")] = 3600.0,
) -> None:
    """Measure each host in turns with itself, print a table, write JSON and a plot; 1 if a host failed."""
    console = console_of(150)
    size = SMOKE if smoke else Size(hidden=hidden, layers=layers, vocabulary=vocabulary, response=response)
    rounds, steps = (3, 1) if smoke else (rounds, steps)
    if loaded and "trl" in {name.partition("=")[0] for name in python}:
        raise typer.BadParameter("--loaded does not work for trl, whose trainer owns its loop")
    rows: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    with over_hosts(python, out) as hosts:
        hosts.prepare("benchmarks.overhead.work", json.dumps(asdict(size)), hosts.folder, log="model.log")
        for host in hosts:
            plan, result = hosts.folder / f"{host}.json", hosts.folder / f"{host}-out.json"
            pairs = tuple(pair for pair in PAIRS[host] if only in pair.spec)
            if not pairs:
                raise typer.BadParameter(f"no pair of {NAMES[host]} has a spec with {only!r}")
            Plan(size, pairs[: 1 if smoke else None], rounds, steps, loaded).write(plan)
            if not hosts.run(host, f"benchmarks.overhead.{host}_steps", plan, hosts.folder, result, limit=limit):
                continue
            found = json.loads(result.read_text())
            versions[host] = found["version"]
            rows += [{"host": host, **summarised(pair)} for pair in found["pairs"]]
    hosts.report(console)
    console.print(table(rows))
    undecided = [f"{NAMES[row['host']]} {row['spec']}" for row in rows if row["verdict"] == UNDECIDED]
    if undecided:
        console.print(f"too noisy for a verdict, here and with so many rounds: {', '.join(undecided)}")
    settings = {"size": asdict(size), "rounds": rounds, "steps": steps, "loaded": loaded, "smoke": smoke}
    about = {"machine": machine(), "command": typed("benchmarks.overhead"), "versions": versions, **settings}
    write_json(out / "overhead.json", {**about, "failed": hosts.failed, "rows": rows})
    if rows:
        plot(rows, out / "overhead.png")
    raise typer.Exit(1 if hosts.failed else 0)


def summarised(pair: dict[str, Any]) -> dict[str, Any]:
    """Return a pair's blocks and their summary."""
    blocks = {arm: [Block(**block) for block in found] for arm, found in pair["blocks"].items()}
    return {**pair, **summary(blocks, pair["target"])}


if __name__ == "__main__":
    typer.run(main)
