"""The picture of the demonstration: reward, KL and entropy over the steps, and the time of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .demo_report import label

COLOURS = ("#555555", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#E69F00", "#56B4E9")  # Okabe and Ito's
MARKERS = "so^DXvP"
PANELS = (
    ("reward", "Reward on held-out prompts", ""),
    ("kl", "Exact KL to the model before training", "nats per completion"),
    ("entropy", "Entropy", "nats per completion"),
)


def draw(path: Path, found: dict[str, Any]) -> None:
    """Write the picture.

    Args:
        path: path of the PNG file.
        found: content of `summary.json`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 7.2))
    arms, settings = found["arms"], found["settings"]
    for (measure, title, unit), axis in zip(PANELS, axes.flat, strict=False):
        for number, (arm, made) in enumerate(arms.items()):
            points = [(p["step"], p[measure]) for p in made["curve"]]
            axis.plot(
                *zip(*points, strict=True), label=label(arm), color=COLOURS[number % 7], marker=MARKERS[number % 7],
                markersize=4.5, linewidth=1.8,
            )  # fmt: skip
        axis.set_title(title, loc="left", fontweight="bold")
        axis.set_ylabel(found["task"]["reward"] if measure == "reward" else unit)
        axis.set_xlabel("optimizer step")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25, linewidth=0.6)
    _seconds(axes[1, 1], arms, found["workers"])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle("A real language model under KL regularisers", x=0.01, ha="left", fontsize=14, fontweight="bold")
    caption = (
        f"{Path(settings['model']).name}, TRL {found['versions']['trl']}, beta {settings['beta']:g}, "
        f"{settings['prompts']} x {settings['generations']} completions of {settings['tokens']} tokens per step. "
        "One seed: a demonstration, not evidence."
    )
    figure.text(0.01, 0.93, caption, fontsize=9, color="#333333", va="top")
    figure.tight_layout(rect=(0, 0.04, 1, 0.92))
    partial = path.with_name(f"{path.stem}.partial.png")
    figure.savefig(partial, dpi=130)
    partial.replace(path)
    plt.close(figure)


def _seconds(axis: Any, arms: dict[str, Any], workers: int) -> None:
    for number, made in enumerate(arms.values()):
        axis.barh(number, made["step_seconds"], color=COLOURS[number % 7], height=0.6)
        axis.text(made["step_seconds"], number, f" {made['step_seconds']:.2f}", va="center", fontsize=9)
    axis.set_yticks(range(len(arms)), list(arms))
    axis.invert_yaxis()
    axis.set_title("Seconds of a step" + (", side by side" if workers > 1 else ""), loc="left", fontweight="bold")
    axis.set_xlabel("median, sampling included")
