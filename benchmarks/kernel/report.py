"""Tables and plots of the kernel benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

HATCHES = {"sampled": "//", "top-k": ".."}
LEGEND = "blue: kl-plugins; hatched: sampled k3; dotted: top-k tokens and a bucket; both are not the exact KL"


def table(case: dict[str, Any]) -> Table:
    """Make the table of one problem."""
    made = Table(
        "contestant", "kind", "ms", "quartiles", "x of ours", "by CPU time", "MB beyond gradients", title=case["title"]
    )
    for row in case["rows"]:
        found = row["seconds"]
        made.add_row(
            row["contestant"],
            row["kind"],
            f"{found['median'] * 1e3:.1f}",
            f"{found['lower'] * 1e3:.1f} - {found['upper'] * 1e3:.1f}",
            f"{row['ratio_to_first']['median']:.2f}",
            f"{row['cpu_ratio_to_first']['median']:.2f}",
            f"{row['peak_bytes_beyond_gradients'] / 1e6:.1f}",
        )
    return made


def plot(cases: list[dict[str, Any]], path: Path) -> None:
    """Draw time and memory of each contestant, with one row of panels per problem."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(cases), 2, figsize=(10, 2.4 * len(cases)), layout="constrained", squeeze=False)
    for (left, right), case in zip(axes, cases, strict=True):
        rows = case["rows"][::-1]
        names = [row["contestant"] for row in rows]
        colours = ["tab:blue" if row["ours"] else "tab:grey" for row in rows]
        hatches = [HATCHES.get(row["kind"], "") for row in rows]
        medians = [row["seconds"]["median"] * 1e3 for row in rows]
        errors = [
            [1e3 * abs(row["seconds"]["median"] - row["seconds"][end]) for row in rows] for end in ("lower", "upper")
        ]
        left.barh(names, medians, xerr=errors, color=colours, hatch=hatches, edgecolor="white")
        left.set(title=case["title"], xlabel="ms, forward and backward (median, quartiles)")
        memory = [row["peak_bytes_beyond_gradients"] / 1e6 for row in rows]
        right.barh(names, memory, color=colours, hatch=hatches, edgecolor="white")
        right.set(xlabel="peak MB beyond the gradients", yticks=[])
        for side in (left, right):
            side.title.set_fontsize(9)
            side.tick_params(labelsize=8)
    figure.suptitle(LEGEND, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
