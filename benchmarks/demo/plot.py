"""The picture of the demonstration: four panels, with the mean over seeds as a line and their range as a band."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .arms import K1_ADVANTAGE, K1_LOSS, K2_LOSS, NATIVE_K3, NONE, Arm

# The colours are Okabe and Ito's. Dashes and markers distinguish the lines in grey prints.
STYLES: dict[str, dict[str, Any]] = {
    NONE.name: {"color": "#555555", "linestyle": "-", "marker": "s"},
    K1_LOSS.name: {"color": "#D55E00", "linestyle": (0, (5, 2)), "marker": "X"},
    NATIVE_K3.name: {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    K2_LOSS.name: {"color": "#009E73", "linestyle": "-", "marker": "^"},
    K1_ADVANTAGE.name: {"color": "#CC79A7", "linestyle": "-", "marker": "D"},
}
ZERO = 1e-6  # nats; a smaller standard deviation is rounding
OTHERS = ("#E69F00", "#56B4E9", "#000000")
PANELS = (
    ("reward", "Reward", "rewarded share of completions", "linear"),
    ("kl", "Exact KL to the reference", "nats per completion", "linear"),
    ("entropy", "Entropy", "nats per completion", "linear"),
    ("coef_std", "Spread of the KL coefficient", "std over tokens, nats", "log"),
)


def draw(
    path: Path, runs: dict[str, dict[int, dict[str, Any]]], arms: list[Arm], reference: dict[str, Any], caption: str
) -> None:
    """Write the picture.

    Args:
        path: path of the PNG file.
        runs: finished runs, by name of the arm and seed.
        arms: the arms in the order of the legend.
        reference: description of the reference, for the dashed lines of the optimum.
        caption: one line below the title.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 7.6), sharex=True)
    extra = iter(OTHERS * len(arms))
    styles = {
        arm.name: STYLES.get(arm.name) or {"color": next(extra), "linestyle": "-.", "marker": "v"} for arm in arms
    }
    for axis, (measure, title, unit, scale) in zip(axes.flat, PANELS, strict=True):
        for arm in arms:
            _line(
                axis, [runs[arm.name][seed]["curve"] for seed in sorted(runs[arm.name])], measure, arm, styles[arm.name]
            )
        if measure in ("reward", "kl"):
            best = reference["optimum"][measure]
            axis.axhline(best, color="black", linewidth=1.4, linestyle=":", label="optimum of E[R] \u2212 \u03b2 KL")
        axis.set_yscale(scale)
        axis.set_ylim(bottom=0 if scale == "linear" else axis.get_ylim()[0] / 2.5)
        axis.set_title(title, loc="left", fontweight="bold")
        axis.set_ylabel(unit)
        axis.grid(alpha=0.25, linewidth=0.6)
    if K1_LOSS.name in runs:
        axes[1, 1].text(
            0.99, 0.04, "k1@loss: 0, its coefficient is 1 for every token", transform=axes[1, 1].transAxes,
            ha="right", va="bottom", fontsize=8, color=STYLES[K1_LOSS.name]["color"],
        )  # fmt: skip
    for axis in axes[1]:
        axis.set_xlabel("optimizer step")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=6, frameon=False, handlelength=2.8, fontsize=9)
    figure.suptitle(
        "GRPO under five KL regularisers" if len(arms) == 5 else "GRPO under KL regularisers",
        x=0.01,
        ha="left",
        fontsize=14,
        fontweight="bold",
    )
    figure.text(0.01, 0.935, caption, fontsize=9, color="#333333", va="top")
    figure.tight_layout(rect=(0, 0.04, 1, 0.925))
    partial = path.with_name(f"{path.stem}.partial.png")
    figure.savefig(partial, dpi=160)
    partial.replace(path)
    plt.close(figure)


def _line(axis: Any, curves: list[list[dict[str, Any]]], measure: str, arm: Arm, style: dict[str, Any]) -> None:
    points = [
        (column[0]["step"], [p[measure] for p in column])
        for column in zip(*curves, strict=True)
        # At the start policy and reference are equal, and a logarithmic axis cannot show the value 0.
        if all(p[measure] is not None and (measure != "coef_std" or p[measure] > ZERO) for p in column)
    ]
    steps = [step for step, _ in points]
    means = [sum(values) / len(values) for _, values in points]
    axis.plot(steps, means, label=arm.label, linewidth=1.8, markersize=4.5, markevery=2, **style)
    axis.fill_between(
        steps, [min(values) for _, values in points], [max(values) for _, values in points],
        color=style["color"], alpha=0.18, linewidth=0,
    )  # fmt: skip
