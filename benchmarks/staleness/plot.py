"""The figures of `benchmarks.staleness`: one with the argument in four panels, and one with further checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.staleness.forces import Curve
from benchmarks.staleness.outcomes import NO_KL

STYLE = {
    "font.size": 9,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
}

# The colours are Okabe and Ito's. Floors have one hue in several shades. Markers and dashes distinguish grey prints.
LOOKS: dict[str, dict[str, Any]] = {
    "no weight": {"color": "#000000", "marker": "o"},
    "token weight": {"color": "#D55E00", "marker": "X"},
    "floor 0.2": {"color": "#8CC5E8", "marker": "v", "linestyle": (0, (1, 1))},
    "floor 0.5": {"color": "#2B8CC4", "marker": "D", "linestyle": (0, (4, 1))},
    "floor 1": {"color": "#08406B", "marker": "^"},
    "cap 2": {"color": "#E69F00", "marker": "s", "linestyle": (0, (4, 1))},
    "cap 1": {"color": "#E69F00", "marker": "p", "linestyle": (0, (1, 1))},
    "floor 0.5 and cap 2": {"color": "#009E73", "marker": "P"},
    "band 0.5-2": {"color": "#CC79A7", "marker": "d", "linestyle": (0, (1, 1))},
    "clip 0.2": {"color": "#7A5C99", "marker": "*", "linestyle": (0, (4, 1, 1, 1))},
    "k3 weighted": {"color": "#009E73", "marker": "<", "linestyle": (0, (4, 1, 1, 1))},
    "Jeffreys weighted": {"color": "#8B5A2B", "marker": ">", "linestyle": (0, (1, 1))},
    "exact": {"color": "#777777", "marker": "h", "linestyle": (0, (4, 1))},
    NO_KL: {"color": "#777777", "marker": "", "linestyle": (0, (6, 2))},
}
MAIN = ("no weight", "floor 1", "floor 0.5 and cap 2", "floor 0.5", "floor 0.2", "cap 2", "token weight")
OTHERS = ("no weight", "token weight", "cap 1", "band 0.5-2", "clip 0.2", "k3 weighted", "Jeffreys weighted", "exact")
DIVERGENCES = {
    "k2": "#000000", "jsd": "#D55E00", "hellinger": "#E69F00", "alpha-0.5": "#CC79A7", "abs": "#777777",
    "k3": "#009E73", "jeffreys": "#2B8CC4", "chi2": "#08406B",
}  # fmt: skip


def _colour(arm: str) -> str:
    return str(LOOKS[arm]["color"])


def line(axes: Axes, arm: str, x: Sequence[float], y: Sequence[float], **more: Any) -> None:
    """Draw the line of one arm in the style of that arm."""
    look = {"linewidth": 1.6, "markersize": 5, "label": arm, **LOOKS[arm], **more}
    axes.plot(x, y, **look)


def pulls(axes: Axes, ratio: Tensor, curves: Mapping[str, Curve]) -> None:
    """Draw the pull of k2 on one token over the token's probability."""
    x = ratio.tolist()
    for arm, curve in curves.items():
        line(axes, arm, x, curve.pulls.tolist(), marker="")
    axes.axhline(0, color="0.4", linewidth=0.8)
    axes.axvline(1, color="0.4", linewidth=0.8)
    axes.set(xscale="log", ylim=(-5, 9), xlim=(1e-6, 1e2), xlabel="p/r: the policy's probability over the reference's")
    axes.set_ylabel("pull on log p, in units of r")
    axes.set_title("A  The weight takes the pull off suppressed tokens", loc="left")
    axes.annotate("no weight", (2e-4, 8.2), (5e-4, 8.2), fontsize=8, va="center")
    axes.annotate("floor 0.5: half\nof it, and it grows", (2e-6, 4.6), fontsize=8, va="top", color=_colour("floor 0.5"))
    axes.annotate("token weight: largest at p = r/e,\nthen fades to nothing", (1e-5, -0.35), fontsize=8, va="top",
                  color=_colour("token weight"))  # fmt: skip


def wells(axes: Axes, ratio: Tensor, curves: Mapping[str, Curve]) -> None:
    """Draw the potential whose negative slope is the pull."""
    x = ratio.tolist()
    for arm, curve in curves.items():
        line(axes, arm, x, curve.wells.tolist(), marker="")
    axes.axhline(1, color=_colour("token weight"), linewidth=0.8, linestyle=":")
    axes.set(xscale="log", xlim=(1e-6, 1e2), ylim=(-0.3, 8), xlabel="p/r", ylabel="potential, in units of r nats")
    axes.set_title("B  A finite well, an infinite one, a reflecting wall", loc="left")
    rim = "token weight, and any weight on\nfresh data: a rim at r, beyond which\nlittle brings a token back"
    axes.annotate(rim, (1.5e-6, 1.15), fontsize=8, va="bottom", color=_colour("token weight"))
    axes.annotate("floor 0.5:\na reflecting wall", (1.5e-4, 6.5), fontsize=8, color=_colour("floor 0.5"))
    axes.annotate("no weight:\nno rim", (3.2e-2, 7.0), fontsize=8)


def courses(axes: Axes, noisy: Mapping[str, Any], still: Mapping[str, Any], delay: float) -> None:
    """Draw the median KL over the updates: in colour with noise, and as thin lines without it."""
    for arm in MAIN:
        axes.plot(still[arm]["median"], color="0.55", linewidth=0.8, linestyle=":")
    for arm in (NO_KL, *MAIN[::-1]):
        curve = noisy[arm]
        x = list(range(len(curve["median"])))
        line(axes, arm, x, curve["median"], markevery=max(1, len(x) // 6))
        if arm in ("no weight", "token weight"):
            axes.fill_between(x, curve["lower"], curve["upper"], color=_colour(arm), alpha=0.12, linewidth=0)
    axes.set(xlabel="update", ylabel="KL to the reference, nats (median)", ylim=(0, None))
    axes.set_title(f"C  Noise pushes; sampler renewed every {delay:g} updates", loc="left")
    axes.annotate("without noise all seven terms converge", (len(x) * 0.35, 0.06), fontsize=8, color="0.35")


def shares(axes: Axes, sweep: Mapping[str, Any], arms: Sequence[str]) -> None:
    """Draw the share of runs that ran away over the swept value, with 95 % intervals."""
    for index, arm in enumerate(arms):
        mine = [row for row in sweep["rows"] if row["arm"] == arm]
        # Small shifts separate the intervals of different arms.
        shift = 1 + 0.025 * (index - (len(arms) - 1) / 2)
        x = [row["value"] * shift for row in mine]
        y = [100 * row["share"] for row in mine]
        below = [100 * (row["share"] - row["low"]) for row in mine]
        above = [100 * (row["high"] - row["share"]) for row in mine]
        line(axes, arm, x, y)
        axes.errorbar(x, y, [below, above], fmt="none", ecolor=_colour(arm), elinewidth=0.9, capsize=2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sweep["values"], [f"{value:g}" for value in sweep["values"]])
    axes.minorticks_off()
    axes.set(xlabel=sweep["title"], ylabel="runs that ran away, %", ylim=(-2, None))


def plot(path: Path, ratio: Tensor, curves: Sequence[Curve], data: Mapping[str, Any]) -> None:
    """Draw the argument in four panels: pull, potential, KL over time, and shares of runs that ran away.

    Args:
        path: path of the PNG file.
        ratio: (N,) p/r.
        curves: curves of all estimators and treatments.
        data: content of the JSON file of the benchmark.
    """
    k2 = {curve.treatment: curve for curve in curves if curve.estimator == "k2" and curve.sampler == 1.0}
    sweep = data["sweeps"]["noise, delay"]
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(11, 8.2))
        panels = figure.subplots(2, 2)
        pulls(panels[0, 0], ratio, {arm: k2[arm] for arm in k2 if arm != "clip 0.2"})
        wells(panels[0, 1], ratio, {arm: k2[arm] for arm in ("no weight", "token weight", "floor 0.5")})
        courses(panels[1, 0], data["courses"]["with noise"], data["courses"]["without noise"], sweep["base"]["delay"])
        shares(panels[1, 1], sweep, MAIN)
        title = f"D  Share of {sweep['base']['runs']} runs that end worse than without a KL term"
        panels[1, 1].set_title(title, loc="left")
        _legend(figure, panels.flat)
        figure.suptitle("k2 under an importance weight on stale data: unbiased is not the same as stable")
        _save(figure, path)


def plot_checks(path: Path, ratio: Tensor, curves: Sequence[Curve], data: Mapping[str, Any]) -> None:
    """Draw the further checks: other divergences, another optimizer, and other step sizes, draws and noise."""
    sweeps = data["sweeps"]
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(15, 8.2))
        panels = figure.subplots(2, 3)
        _divergences(panels[0, 0], ratio, curves)
        for axes, name, arms, title in (
            (panels[0, 1], "noise, delay", OTHERS, "noisy policy gradient, SGD: other terms"),
            (panels[0, 2], "noise, strength", MAIN, "the same, by strength of the noise (delay 64)"),
            (panels[1, 0], "adam, delay", MAIN, "no policy gradient, Adam, one draw per update"),
            (panels[1, 1], "adam, delay", OTHERS, "the same: other terms"),
            (panels[1, 2], "adam, rate", MAIN, "the same, by step size (delay 64)"),
        ):
            shares(axes, sweeps[name], arms)
            axes.set_title(title, loc="left")
        _legend(figure, panels.flat[1:])
        _save(figure, path)


def _divergences(axes: Axes, ratio: Tensor, curves: Sequence[Curve]) -> None:
    found = {c.estimator: c for c in curves if c.treatment == "token weight" and c.sampler == 1.0}
    below = ratio < 0.95
    for index, (name, colour) in enumerate(DIVERGENCES.items()):
        axes.plot(ratio[below].tolist(), found[name].pulls[below].tolist(), color=colour, label=name, linewidth=1.6,
                  linestyle="-" if index % 2 else (0, (4, 1)))  # fmt: skip
    axes.set(xscale="log", yscale="log", ylim=(1e-7, 1e3), xlabel="p/r", ylabel="pull on log p, in units of r")
    axes.set_title("pull of each divergence under the token weight", loc="left")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower right")


def _legend(figure: Figure, panels: Any) -> None:
    handles = {}
    for axes in panels:
        drawn, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, drawn, strict=True))
    handles = {label: handles[label] for label in LOOKS if label in handles}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
