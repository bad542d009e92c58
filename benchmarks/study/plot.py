"""The study's figures: training curves, results over staleness, and all verdicts on one page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib as mpl

from benchmarks.demo.plot import OTHERS, STYLES

mpl.use("Agg")
import matplotlib.pyplot as plt

MARK = {"reproduced": "o", "not reproduced": "X", "undecided": "s"}
COLOUR = {"reproduced": "#009E73", "not reproduced": "#D55E00", "undecided": "#777777"}
# The arms have the same colours and lines as in the demo; k3@loss has those of the demo's native-k3.
LOOKS = {name.replace("native-k3", "k3@loss"): (style["color"], style["linestyle"]) for name, style in STYLES.items()}
MORE = [(colour, line) for line in ("-.", ":", "--") for colour in OTHERS]


def draw_all(folder: Path, data: Mapping[str, Any]) -> None:
    """Write `curves-TASK-FAMILY.png`, `staleness.png` and `verdicts.png`, each if there are runs for it."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "grid.alpha": 0.25})  # fmt: skip
    arms = list(dict.fromkeys(cell["arm"] for cell in data["cells"]))
    others = [arm for arm in arms if arm not in LOOKS]
    looks = LOOKS | {arm: MORE[i % len(MORE)] for i, arm in enumerate(others)}
    fresh = [c for c in data["cells"] if c["delay"] == 0 and c["precision"] == "fp32"]
    for task, family in dict.fromkeys((c["task"], c["family"]) for c in fresh):
        mine = [c for c in fresh if (c["task"], c["family"]) == (task, family)]
        _curves(folder / f"curves-{task}-{family}.png", f"{task}, {family}, fresh data", mine, looks)
    _staleness(folder / "staleness.png", data, looks)
    if data["claims"]:
        _verdicts(folder / "verdicts.png", data["claims"])


def _curves(path: Path, title: str, cells: list[Any], looks: Mapping[str, Any]) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    units = ("rewarded share", "KL to the reference, nats", "entropy, nats per completion")
    for axes, name, unit in zip(panels, ("reward", "kl", "entropy"), units, strict=True):
        for cell in cells:
            curve, (colour, line) = cell["curves"], looks[cell["arm"]]
            axes.plot(curve["step"], curve[name], color=colour, linestyle=line, label=cell["arm"], linewidth=1.6)
            axes.fill_between(
                curve["step"], curve[f"{name} low"], curve[f"{name} high"], color=colour, alpha=0.15, linewidth=0
            )
        axes.set(xlabel="optimizer step", ylabel=unit)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"{title}: mean and range over {len(cells[0]['seeds'])} seeds")
    _save(figure, path)


def _staleness(path: Path, data: Mapping[str, Any], looks: Mapping[str, Any]) -> None:
    """Plot final objective and KL over the sampler's delay, for all arms that were trained on stale data."""
    groups: dict[tuple[str, str], dict[str, dict[int, Any]]] = {}
    for cell in data["cells"]:
        if cell["precision"] == "fp32":
            by_arm = groups.setdefault((cell["task"], cell["family"]), {}).setdefault(cell["arm"], {})
            by_arm[cell["delay"]] = cell["measures"]
    groups = {key: {a: d for a, d in arms.items() if max(d) > 0} for key, arms in groups.items()}
    groups = {key: arms for key, arms in groups.items() if arms}
    if not groups:
        return
    figure, panels = plt.subplots(len(groups), 2, figsize=(9, 3.4 * len(groups)), layout="constrained", squeeze=False)
    for row, ((task, family), arms) in zip(panels, groups.items(), strict=True):
        for axes, name in zip(row, ("objective", "kl"), strict=True):
            for arm, by_delay in arms.items():
                delays = sorted(by_delay)
                values = [by_delay[d][name] for d in delays]
                spread = [stdev(v) if len(v) > 1 else 0.0 for v in values]
                colour, line = looks[arm]
                axes.errorbar(delays, [mean(v) for v in values], spread, color=colour, linestyle=line, marker="o",
                              markersize=4, capsize=3, label=arm)  # fmt: skip
            axes.set_xscale("symlog", linthresh=1)
            axes.set_xticks([0, 1, 4, 16], ["0", "1", "4", "16"])
            axes.set(xlabel="updates that the sampler is behind", title=f"{task}, {family}",
                     ylabel="E[R] - beta KL at the end" if name == "objective" else "KL at the end, nats")  # fmt: skip
    panels[0][0].legend(fontsize=7, frameon=False)
    figure.suptitle("Stale samples: mean and standard deviation over seeds")
    _save(figure, path)


def _verdicts(path: Path, rows: list[Any]) -> None:
    """Plot each test's effect against its threshold, in units of the test's own scale."""
    figure, axes = plt.subplots(figsize=(9, 0.28 * len(rows) + 1.2), layout="constrained")
    for place, row in enumerate(rows):
        middle, low, high = ((row[k] or 0.0) for k in ("effect", "low", "high"))
        scale = max(abs(row["threshold"]), abs(middle), (high - low) / 2, 1e-9)
        kept = {"color": COLOUR[row["verdict"]]}
        if row["low"] is not None:
            axes.plot([low / scale, high / scale], [place, place], linewidth=2, clip_on=True, **kept)
        axes.plot(middle / scale, place, MARK[row["verdict"]], **kept)
        edges = [row["threshold"]] if row["direction"] != "within" else [-row["threshold"], row["threshold"]]
        axes.plot([e / scale for e in edges], [place] * len(edges), "|", color="black", markersize=11)
    axes.set_yticks(range(len(rows)), [f"{r['claim']} ({r['task']}, {r['family']}) {r['direction']}" for r in rows],
                    fontsize=7)  # fmt: skip
    axes.invert_yaxis()
    axes.set_xlim(-2.2, 2.2)
    axes.set_xlabel("effect, each row in its own unit; black bars: the threshold")
    for verdict, mark in MARK.items():
        axes.plot([], [], mark, color=COLOUR[verdict], label=verdict)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.partial.png")
    figure.savefig(partial, dpi=150)
    partial.replace(path)
    plt.close(figure)
