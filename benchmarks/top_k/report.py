"""The table and the figure of `benchmarks.top_k`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .findings import MOST_BYTES, MOST_NOISE, TRAINED, bytes_per_token

STYLE = {
    "font.size": 9,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
}
COLOURS = {True: "#0072B2", False: "#D55E00"}  # Okabe and Ito's: with the bucket, and without it
MARKERS = {True: "o", False: "s"}
NAMES = {True: "sum and bucket", False: "sum alone, without the bucket"}
HEADS = ("noise", "95 % interval", "10 %", "median", "90 %", "to gradient", "B/token", "MB/1 M tokens")
LIMITS = (
    "The noise is that of the logit gradient in single states, over the token that is drawn there. The choice of the "
    "states is noise of all estimators, also of exact@loss, and is not in it.",
    "The interval covers the sequences that were drawn, and not other prompts, training runs or models.",
    "The bytes are those of 2 k + 1 numbers of four bytes, and of 3 m + 1 more with m draws, without the rest of a "
    "message.",
)


def table(found: Mapping[str, Any]) -> str:
    """Return the results as text.

    Args:
        found: content of `top_k.json`.
    """
    settings, machine = found["settings"], found["machine"]
    lines = [
        f"{Path(settings['model']).name}, task {settings['task']}, completions of at most {settings['tokens']} tokens, "
        f"{machine['gpu'] or machine['processor']}, torch {machine['torch']}"
    ]
    for policy in found["policies"]:
        rows = [row for row in found["rows"] if row["policy"] == policy["policy"]]
        lines += ["", *_table(policy, rows)]
    lines += [
        "",
        "noise: token noise of the logit gradient relative to k2@loss, with its 95 % interval over sequences and the "
        "quantiles of single states; to gradient: relative to the squared gradient of the KL.",
        *LIMITS,
        "",
        found["verdict"],
    ]
    if found["smoke"]:
        lines.append("These numbers are from a smoke run: they mean nothing.")
    return "\n".join(lines) + "\n"


def _table(policy: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield (
        f"{policy['policy']} ({policy['kind']}): {policy['kl_per_token']:.4f} nats per token "
        f"({policy['kl_low']:.4f} to {policy['kl_high']:.4f}), {policy['states']} states of {policy['sequences']} "
        f"sequences; differs from the library by {policy['difference_to_library']:.1e} nats"
    )
    width = max(len(row["estimator"]) for row in rows)
    yield f"{'':{width}}" + "".join(f"{head:>16}" for head in HEADS)
    for row in rows:
        size = row["bytes_per_token"]
        cells = (
            f"{row['noise']:.4f}", f"{row['low']:.4f}-{row['high']:.4f}", f"{row['q10']:.4f}", f"{row['q50']:.4f}",
            f"{row['q90']:.4f}", f"{row['to_gradient']:.3f}", "" if size is None else str(size),
            "" if size is None else f"{row['bytes_per_million_tokens'] / 1e6:.0f}",
        )  # fmt: skip
        yield f"{row['estimator']:{width}}" + "".join(f"{cell:>16}" for cell in cells)


def plot(path: Path, found: Mapping[str, Any]) -> None:
    """Draw the noise over k, one panel per policy, with the limits of the rule.

    Args:
        path: path of the PNG file.
        found: content of `top_k.json`.
    """
    policies = found["policies"]
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(5.5 * len(policies), 4.6))
        panels = figure.subplots(1, len(policies), sharey=True, squeeze=False)[0]
        for axes, policy in zip(panels, policies, strict=True):
            _panel(axes, policy, [row for row in found["rows"] if row["policy"] == policy["policy"]])
        panels[0].set_ylabel("token noise of the logit gradient, relative to k2@loss")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        smoke = " (smoke run: the numbers mean nothing)" if found["smoke"] else ""
        figure.suptitle(f"exact@loss/top:<k>: noise by k{smoke}", x=0.01, ha="left", fontweight="bold")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.stem}.partial{path.suffix}")
        figure.savefig(partial)
        partial.replace(path)


def _panel(axes: Axes, policy: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    ks: list[int] = []
    for bucket, colour in COLOURS.items():
        mine = [row for row in rows if row["bucket"] is bucket and not row.get("draws")]
        ks = [row["k"] for row in mine]
        middle = [row["noise"] for row in mine]
        ends = [
            [max(0.0, row["noise"] - row["low"]) for row in mine],
            [max(0.0, row["high"] - row["noise"]) for row in mine],
        ]
        axes.errorbar(
            ks, middle, ends, color=colour, marker=MARKERS[bucket], markersize=5, linewidth=1.6, capsize=2.5,
            label=NAMES[bucket],
        )  # fmt: skip
        lower, upper = ([row[name] for row in mine] for name in ("q10", "q90"))
        axes.fill_between(ks, lower, upper, color=colour, alpha=0.1, linewidth=0)
    for marker, draws in zip("v^D", sorted({row["draws"] for row in rows if row.get("draws")})[:3], strict=False):
        mine = [row for row in rows if row.get("draws") == draws]
        axes.plot(
            [row["k"] for row in mine], [row["noise"] for row in mine], color="#009E73", marker=marker, markersize=5,
            linewidth=1.2, label=f"with {draws} draws",
        )  # fmt: skip
    axes.axhline(MOST_NOISE, color="0.3", linewidth=0.9, linestyle="--", label=f"limit of the rule, {MOST_NOISE:g}")
    within = [k for k in ks if bytes_per_token(k) <= MOST_BYTES]
    if within and within[-1] != ks[-1]:
        axes.axvspan(within[-1] * 2**0.5, ks[-1] * 2**0.5, color="0.5", alpha=0.12, linewidth=0)
        axes.annotate(f"more than {MOST_BYTES} B", (within[-1] * 2**0.55, 0.95), xycoords=("data", "axes fraction"),
                      fontsize=8, va="top")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set_ylim(0, None)
    axes.set_xlabel("k")
    title = policy["policy"] if policy["kind"] == TRAINED else f"{policy['policy']} (does not count)"
    axes.set_title(f"{title}: {policy['kl_per_token']:.3f} nats per token", loc="left")
