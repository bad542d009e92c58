"""Table and plot of steps with specs and steps with the hosts' own KL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.hosts.cases import NAMES
from benchmarks.hosts.report import COLOURS, MARKERS
from benchmarks.overhead.plan import HOST, Pair


def interval(found: dict[str, float], scale: float, form: str) -> str:
    """Return the text of a mean and its interval, multiplied by ``scale``."""
    mean, low, high = (format(scale * found[name], form) for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


TITLES = ("host", "its own KL", "spec", "host ms", "adds ms [95 %]", "adds [95 %]", "against the target", "memory")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Return a pair's line of the table, in the order of :data:`TITLES`."""
    return (
        NAMES[row["host"]],
        row["name"],
        row["spec"],
        f"{row['seconds'][HOST]['median'] * 1e3:.1f}",
        interval(row["extra_seconds"], 1e3, "+.1f"),
        interval(row["extra"], 100, "+.1f") + " %",
        row["verdict"] if row["target"] is None else f"{row['target']:.0%}: {row['verdict']}",
        f"{row['memory_ratio']['median']:.3f}",
    )


def table(rows: list[dict[str, Any]]) -> Table:
    """Make a table with one line per pair."""
    made = Table(*TITLES, title="one optimizer step")
    for row in rows:
        made.add_row(*cells(row))
    return made


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the ratios of time and peak memory of pairs with the same gradient; grey compares the host with itself."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows[::-1] if row["same_gradient"]]
    figure, panels = plt.subplots(1, 2, figsize=(12, 1.6 + 0.5 * len(rows)), layout="constrained", sharey=True)
    for axes, own, noise, title in (
        (panels[0], "ratio", "noise", "time of a step"),
        (panels[1], "memory_ratio", "memory_noise", "peak memory"),
    ):
        for index, row in enumerate(rows):
            for place, key, colour in ((index - 0.15, noise, "tab:grey"), (index + 0.15, own, COLOURS[row["host"]])):
                found = row[key]
                error = [[found["median"] - found["lower"]], [found["upper"] - found["median"]]]
                axes.errorbar(found["median"], place, xerr=error, fmt=MARKERS[row["host"]], color=colour, capsize=3)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.axvline(1.0 + (Pair.target or 0.0), color="black", linewidth=0.8, linestyle="--")
        axes.set(title=title, xlabel="spec over the host's own KL (grey: the host over itself); median, quartiles")
        axes.xaxis.label.set_fontsize(8)
    labels = [f"{NAMES[row['host']]} {row['name']}\n{row['spec']}" for row in rows]
    panels[0].set_yticks(range(len(rows)), labels, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
