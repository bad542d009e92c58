"""Which plots the page has, in which order: metrics of all runs by subject, and what each plot shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kl_plugins.metric_names import COMPARED, LEVELS
from kl_plugins.report.native import Role
from kl_plugins.report.run import Run, is_ours, meaning, unit
from kl_plugins.report.series import Series

SECTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Reward", ("@reward",)),
    ("KL to the reference", ("kl/value", "kl/exact", "kl/reverse_k1", "kl/reverse_k1_is", "@kl")),
    (
        "How far the data are from the policy",
        ("kl/ess", "kl/floor_frac", "kl/weight/mean", "kl/weight/max", "kl/trust_region", "kl/cap_frac"),
    ),
    (
        "How the term pulls",
        ("kl/beta", "@beta", "kl/coef/mean", "kl/coef/std", "kl/coef/max", "kl/dead_frac", "kl/active"),
    ),
    (
        "Probes of the batch",
        (
            *(f"kl/probe/{name}/{what}" for what in ("cosine", "norm_ratio") for name in COMPARED),
            "kl/probe/host/dead_frac",
            *(f"kl/probe/{level}/{what}" for what in ("ess", "weight") for level in LEVELS),
            "kl/probe/kept_mass",
        ),
    ),
    ("Log-ratios", ("kl/log_ratio/mean", "kl/log_ratio/max", "kl/disagree")),
    ("Other metrics of kl-plugins", ("kl/*",)),
    ("The framework's own metrics", ("@other_kl", "@entropy", "@grad_norm")),
)
"""Headings, and metrics: keys, ``@`` and a role of the framework's metrics, or ``kl/*`` for all that are not named."""

TITLES: dict[Role, str] = {
    "reward": "reward",
    "kl": "the framework's own KL",
    "beta": "the framework's own coefficient",
    "other_kl": "KL between old and new policy",
    "entropy": "entropy",
    "grad_norm": "norm of the gradient",
}
UNITS: dict[Role, str] = {"kl": "nats", "other_kl": "nats", "entropy": "nats"}


@dataclass(frozen=True)
class Line:
    """One line of a plot: the index and name of the run, the metric, and its values."""

    run: int
    name: str
    key: str
    series: Series


@dataclass(frozen=True)
class Chart:
    """One plot.

    Attributes:
        anchor: its id on the page.
        title: the metric, or what the metrics stand for.
        unit: unit of the values; may be empty.
        description: what the values are.
        lines: one line per run and metric.
    """

    anchor: str
    title: str
    unit: str
    description: str
    lines: tuple[Line, ...]


def anchor(key: str) -> str:
    """Return the id of the plot of a metric."""
    return "plot-" + "".join(character if character.isalnum() else "-" for character in key)


def charts(runs: Sequence[Run]) -> list[tuple[str, list[Chart]]]:
    """Return all sections that have at least one plot: heading and plots."""
    named = {key for _, keys in SECTIONS for key in keys}
    found = []
    for heading, keys in SECTIONS:
        plots: list[Chart] = []
        for key in keys:
            if key == "kl/*":
                others = sorted({each for run in runs for each in run.series if is_ours(each) and each not in named})
                plots += [_ours(each, runs) for each in others]
            elif key.startswith("@"):
                plots += _by_role(key[1:], runs)  # type: ignore[arg-type]
            elif any(key in run.series for run in runs):
                plots.append(_ours(key, runs))
        if plots:
            found.append((heading, plots))
    return found


def anchor_of(key: str, sections: Sequence[tuple[str, Sequence[Chart]]]) -> str:
    """Return the id of the plot that shows a metric, or an empty text if none does."""
    for _, plots in sections:
        for chart in plots:
            if any(line.key == key for line in chart.lines):
                return chart.anchor
    return ""


def _ours(key: str, runs: Sequence[Run]) -> Chart:
    lines = tuple(Line(i, run.name, key, run.series[key]) for i, run in enumerate(runs) if key in run.series)
    return Chart(anchor(key), key, unit(key), meaning(key) or "this version of kl-plugins does not describe it", lines)


def _by_role(role: Role, runs: Sequence[Run]) -> Iterator[Chart]:
    lines = tuple(Line(i, run.name, key, run.series[key]) for i, run in enumerate(runs) for key in run.of_role(role))
    if not lines:
        return
    told = {
        f"{run.logs.title}: {key} {run.known[key].meaning}"
        for run in runs
        for key in run.of_role(role)
        if run.logs and run.known[key].meaning
    }
    keys = ", ".join(sorted({line.key for line in lines}))
    yield Chart(anchor(role), TITLES[role], UNITS.get(role, ""), "; ".join(sorted(told)) or keys, lines)
