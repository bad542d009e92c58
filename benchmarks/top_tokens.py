"""Times the search for the most probable tokens against ``torch.topk``, in turns on the same logits.

Run it by ``python -m benchmarks.top_tokens``. It writes JSON and a plot into ``out/bench/top_tokens``.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from benchmarks.command_line import console_of, typed
from benchmarks.overhead.measure import spread
from benchmarks.reporting import machine, write_json
from kl_plugins.top_k import top_tokens

SHAPES = ((1344, 8192), (512, 32_000), (128, 151_936))
"""States and vocabulary: the overhead benchmark's step, and the vocabularies of Llama 2 and Qwen2."""

SMOKE = ((3, 500),)
COPIES = 4
"""Different logits per round: with the same numbers in each round, a processor would learn its branches by heart."""

SEARCHES = {"torch.topk": lambda logits, k: logits.topk(k).indices, "top_tokens": top_tokens}


def measure(states: int, vocabulary: int, k: int, dtype: torch.dtype, device: str, rounds: int) -> dict[str, Any]:
    """Time both searches, and return the milliseconds of each round and their summary.

    Args:
        states: number of rows of logits.
        vocabulary: number of logits in a row.
        k: number of tokens to find.
        dtype: dtype of the logits.
        device: device of the logits.
        rounds: number of measurements of each search.

    Returns:
        ``ms``: a list for each search. ``median_ms``: its median. ``ratio``: time of the second search over that of the
        first in the same round, as median and quartiles.
    """
    random = torch.Generator().manual_seed(0)
    logits = [3 * torch.randn(states, vocabulary, generator=random).to(device, dtype) for _ in range(COPIES)]
    times: dict[str, list[float]] = {name: [] for name in SEARCHES}
    for index in range(rounds + 1):
        for name in list(SEARCHES)[:: 1 if index % 2 else -1]:
            start = time.perf_counter()
            for rows in logits:
                SEARCHES[name](rows, k)
            if device != "cpu":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) * 1e3 / COPIES)
    times = {name: found[1:] for name, found in times.items()}  # the first round includes allocations
    peer, ours = times.values()
    return {
        "states": states,
        "vocabulary": vocabulary,
        "ms": times,
        "median_ms": {name: statistics.median(found) for name, found in times.items()},
        "ratio": spread([b / a for a, b in zip(peer, ours, strict=True)]),
    }


def main(
    out: Annotated[Path, typer.Option(help="Folder for JSON and plot.")] = Path("out/bench/top_tokens"),
    k: Annotated[int, typer.Option(min=1, help="Number of tokens to find.")] = 64,
    rounds: Annotated[int, typer.Option(min=3, help="Measurements per search and size.")] = 31,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    smoke: Annotated[bool, typer.Option("--smoke", help="A tiny size: that it runs, no numbers.")] = False,
) -> None:
    """Measure, print a table, write JSON and a plot."""
    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    rows = [measure(*shape, k, kind, device, rounds) for shape in (SMOKE if smoke else SHAPES)]
    table = Table("states", "vocabulary", *(f"{name} ms" for name in SEARCHES), "ratio [quartiles]")
    for row in rows:
        ratio = row["ratio"]
        times = (f"{value:.2f}" for value in row["median_ms"].values())
        spread = f"{ratio['median']:.2f} ({ratio['lower']:.2f} to {ratio['upper']:.2f})"
        table.add_row(str(row["states"]), str(row["vocabulary"]), *times, spread)
    console_of(100).print(table)
    about = {"machine": machine(), "command": typed("benchmarks.top_tokens"), "k": k, "dtype": dtype, "smoke": smoke}
    write_json(out / "top_tokens.json", {**about, "rounds": rounds, "rows": rows})
    plot(rows, out / "top_tokens.png")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the time of each search per state over the vocabulary."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name in SEARCHES:
        per_state = [1e3 * row["median_ms"][name] / row["states"] for row in rows]
        axes.plot([row["vocabulary"] for row in rows], per_state, marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens in the vocabulary", ylabel="microseconds per state (median)")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
