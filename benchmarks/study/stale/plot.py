"""The figure of the selection: KL over training, and E[R] - beta KL of every run at the end, at every delay."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

from .arms import NONE, TODAY, UNWEIGHTED

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {NONE: "#999999", TODAY: "#D55E00", UNWEIGHTED: "#000000"}
CHOSEN = "#0072B2"
WORST = -0.1
"""Values of E[R] - beta KL below this one are drawn at the left edge. How far below they are does not matter."""


def draw(path: Path, data: Mapping[str, Any]) -> None:
    """Write the figure of the selection.

    Args:
        path: path of the PNG file.
        data: content of `stale.json`.
    """
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "grid.alpha": 0.25})  # fmt: skip
    rows = [row for row in data["selection"]["rows"] if (row["task"], row["family"]) == ("rare", "qwen2")]
    delays = sorted({row["delay"] for row in rows})
    colours = COLOURS | ({} if data["verdict"]["chosen"] in COLOURS else {data["verdict"]["chosen"]: CHOSEN})
    names = list(dict.fromkeys(row["arm"] for row in rows))
    figure, panels = plt.subplots(2, len(delays), figsize=(3.1 * len(delays), 7), layout="constrained", squeeze=False)
    for upper, lower, delay in zip(panels[0], panels[1], delays, strict=True):
        mine = {row["arm"]: row for row in rows if row["delay"] == delay}
        for arm, colour in colours.items():
            for count, curve in enumerate(mine[arm]["kl curves"] if arm in mine else []):
                upper.plot(mine[arm]["step"], curve, color=colour, linewidth=1.1, alpha=0.8,
                           label=arm if count == 0 else None)  # fmt: skip
        upper.set_yscale("log")
        upper.set_ylim(0.2, 40)
        age = {0: "fresh data", 1: "data one update old"}.get(delay, f"data {delay} updates old")
        upper.set(title=age, xlabel="optimizer step")
        for place, arm in enumerate(names):
            if arm in mine:
                _runs(lower, place, mine[arm], colours.get(arm, "#56B4E9"))
        lower.set_xlim(WORST - 0.02, 0.3)
        lower.set_ylim(len(names) - 0.5, -0.5)
        lower.set_yticks(range(len(names)), names if delay == delays[0] else [""] * len(names), fontsize=7)
        lower.set_xlabel(f"E[R] - beta KL at the end\n(left edge: {WORST:g} or less)")
    panels[0][0].set_ylabel("KL to the reference, nats")
    panels[1][0].plot([], [], "x", color="black", label="KL above that of no KL term")
    panels[1][0].plot([], [], "v", color="black", markerfacecolor="none", label="held, but reward lost")
    handles, labels = panels[0][0].get_legend_handles_labels()
    more = panels[1][0].get_legend_handles_labels()
    figure.legend(handles + more[0], labels + more[1], loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("KL over training, and E[R] - beta KL at its end: one line or mark per run")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.partial.png")
    figure.savefig(partial, dpi=130)
    partial.replace(path)
    plt.close(figure)


def _runs(axes: Any, place: int, row: Mapping[str, Any], colour: str) -> None:
    """Draw E[R] - beta KL of each run of an arm.

    A cross is a run whose KL was above that of the run without a KL term. A triangle is a run that only lost its
    reward. A dot is any other run.
    """
    for seed, value in zip(row["seeds"], row["objectives"], strict=True):
        mark = "x" if seed in row["above"] else "v" if seed in row["lost"] else "o"
        filled = "none" if mark == "v" else colour
        axes.plot(max(value, WORST), place, mark, color=colour, markerfacecolor=filled, markersize=5, clip_on=False)
