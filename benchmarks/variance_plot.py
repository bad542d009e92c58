"""The figure of `benchmarks.variance`: variance of each row, and its dependence on the KL to the reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# The style has marks and lines that are distinguishable in a black-and-white print.
STYLE = {
    "font.size": 9,
    "axes.grid": True,
    "grid.color": "0.85",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")

SWEEP_ROWS = (
    "k1@reward",
    "k1@advantage/future:k3",
    "k1@advantage/future:exact",
    "exact@loss/horizon:sequence",
    "k2@loss",
    "k3@loss",
)


def dots(axes: Axes, results: Sequence[dict[str, Any]]) -> None:
    """Draw the median and the range over seeds of every row, with one marker per setting."""
    rows = list(results[0]["rows"])
    for index, result in enumerate(results):
        for place, row in enumerate(rows):
            numbers = result["rows"][row]
            found = [sample["variance"] for sample in numbers["seeds"]]
            height = place + 0.24 * (index - (len(results) - 1) / 2)
            fill = "black" if numbers["bias_sequence"] < 1e-9 else "white"
            axes.plot([min(found), max(found)], [height, height], color="0.6", linewidth=1)
            axes.plot(numbers["variance"], height, MARKERS[index], color="black", markerfacecolor=fill, markersize=5)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("trace variance / |sequence gradient|²")
    # The legend has its own markers, because whether a drawn marker is filled depends on the bias.
    handles = [
        Line2D(
            [],
            [],
            marker=MARKERS[index],
            linestyle="",
            color="0.4",
            label=f"T={r['length']}, {r['sequence_kl']:g} nats",
        )
        for index, r in enumerate(results)
    ]
    handles.append(
        Line2D([], [], marker="o", linestyle="", color="black", label="filled: unbiased for the sequence KL")
    )
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.3, -0.12), ncols=2, frameon=False)


def sweep(axes: Axes, results: Sequence[dict[str, Any]]) -> None:
    """Draw the median variance over the distance to the reference."""
    distances = [result["sequence_kl"] for result in results]
    for index, row in enumerate(row for row in SWEEP_ROWS if row in results[0]["rows"]):
        axes.plot(
            distances,
            [result["rows"][row]["variance"] for result in results],
            LINES[index % len(LINES)],
            marker=MARKERS[index],
            markersize=4,
            color=str(0.12 * index),
            label=row,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(f"KL of sequences to the reference, nats (T={results[0]['length']})")
    axes.set_ylabel("trace variance / |sequence gradient|²")
    axes.legend(loc="upper left", frameon=False)


def plot(results: Sequence[dict[str, Any]], swept: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw on-policy rows, off-policy rows if there are any, and the sweep over distances, and save the figure."""
    groups = {
        "on-policy": [result for result in results if result["data"] == "current"],
        "data from a stale, mismatched sampler": [result for result in results if result["data"] != "current"],
    }
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(12, 10))
        panels = figure.subplot_mosaic([[*groups], ["sweep", "sweep"]], height_ratios=[3, 2])
        for title, group in groups.items():
            panels[title].set_title(title)
            if group:
                dots(panels[title], group)
        panels["sweep"].set_title("on-policy, by distance to the reference")
        sweep(panels["sweep"], swept)
        figure.suptitle(
            f"Variance of one sequence's KL gradient, by enumeration (V={results[0]['vocab']}, "
            f"logit scale {results[0]['logit_scale']:g}, {len(results[0]['seed_numbers'])} seeds)"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
