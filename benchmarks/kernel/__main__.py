"""The command line of the kernel benchmark."""

from __future__ import annotations

import os
import sys
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.command_line import console_of, typed
from benchmarks.kernel.contestants import Contestant, of_hidden_states, of_logits
from benchmarks.kernel.measure import compare
from benchmarks.kernel.problems import Size, problem
from benchmarks.kernel.report import plot, table
from benchmarks.reporting import machine, write_json

SIZES = {
    "smoke": (Size(8, 1024), Size(8, 1024, 16)),
    "cpu": (
        *(Size(512, 32_768), Size(128, 152_064)),
        *(Size(256, 32_768, 512), Size(128, 152_064, 896), Size(4096, 32_768, 256)),
    ),
    "cuda": (Size(8192, 32_768), Size(8192, 152_064), Size(4096, 152_064, 896), Size(8192, 152_064, 3584)),
}
PEERS = ("trl", "liger-kernel", "verl", "triton")


def main(
    out: Annotated[Path, typer.Option(help="Folder for JSON and plots.")] = Path("out/bench/kernel"),
    rounds: Annotated[int, typer.Option(min=3, help="Timed passes of each contestant.")] = 7,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    sizes: Annotated[str, typer.Option(help="smoke, cpu or cuda; the device's by default.")] = "",
    dtypes: Annotated[str, typer.Option(help="Comma-separated torch dtypes.")] = "float32,bfloat16",
    only: Annotated[str, typer.Option(help="logits or hidden; both by default.")] = "",
) -> None:
    """Measure every contestant on every size, print tables, write JSON and a plot per dtype."""
    console = console_of(140)
    chosen = [size for size in SIZES[sizes or device] if only in ("", "hidden" if size.width else "logits")]
    for name in dtypes.split(","):
        cases: list[dict[str, Any]] = []
        for size in chosen:
            cases.append(case(size, name, device, rounds))
            console.print(table(cases[-1]))
            for line in cases[-1]["absent"]:
                console.print(f"not measured: {line}")
            # The file is written after every size, so that an interrupted run keeps its results.
            stem = "-".join(filter(None, ("kernel", device, name, only)))
            write_json(out / f"{stem}.json", {**surroundings(), "rounds": rounds, "cases": cases})
            plot(cases, out / f"{stem}.png")


def case(size: Size, dtype: str, device: str, rounds: int) -> dict[str, Any]:
    """Measure one size in one dtype."""
    found = list((of_hidden_states if size.width else of_logits)(device))
    present = [it for it in found if isinstance(it, Contestant)]
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(f"{dtype}, {size}", total=None)
        rows = compare(
            present, problem(size, getattr(torch, dtype), device), rounds, partial(progress.update, task, advance=1)
        )
    absent = [str(it) for it in found if not isinstance(it, Contestant)]
    return {"title": f"{size}, {dtype}", "size": size._asdict(), "rows": rows, "absent": absent}


def surroundings() -> dict[str, object]:
    """Return the machine, the command, and the versions of the peers."""
    peers = {}
    for name in PEERS:
        try:
            peers[name] = version(name)
        except PackageNotFoundError:
            peers[name] = None
    return {"machine": machine(), "command": typed("benchmarks.kernel"), "peers": peers}


if __name__ == "__main__":
    if os.environ.get("MALLOC_MMAP_THRESHOLD_") is None:
        # With a fixed threshold, glibc returns the memory of freed tensors. Otherwise the peak of one contestant could
        # hide that of another.
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.kernel", *sys.argv[1:]])
    typer.run(main)
