"""A run as its log shows it: metrics by name, and what the page knows about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kl_plugins.metric_names import AGE, MEANINGS, OBSERVATION
from kl_plugins.report.native import HostLogs, Known, Role, canonical, known_metrics, recognise
from kl_plugins.report.series import Series, series_of

OURS = "kl/"
"""Beginning of the names of kl-plugins' own metrics."""

BETA = "kl/beta"
"""The one metric that hosts add to those of a term."""


@dataclass(frozen=True)
class Run:
    """One log.

    Attributes:
        name: short name for legends.
        path: the file or folder that was read.
        kind: the format, in words.
        series: every metric of the log, by its name without the prefix of a logger.
        notes: what was left out while reading, in words.
        logs: what the framework that wrote it says about its metrics, or None if it is unknown.
        known: role and meaning of the framework's metrics in this log.
    """

    name: str
    path: Path
    kind: str
    series: Mapping[str, Series]
    notes: tuple[str, ...] = ()
    logs: HostLogs | None = None
    known: Mapping[str, Known] = field(default_factory=dict)

    @property
    def active(self) -> bool:
        """Whether the log has metrics of kl-plugins."""
        return any(is_ours(key) for key in self.series)

    def of_role(self, role: Role) -> list[str]:
        """Return the framework's metrics with a role."""
        return [key for key, known in self.known.items() if known.role == role]

    def steps(self) -> tuple[int, int] | None:
        """Return the first and the last logged step, or None if the log is empty."""
        steps = [step for series in self.series.values() for step in (series.steps[0], series.steps[-1])]
        return (min(steps), max(steps)) if steps else None


def make_run(
    name: str,
    path: Path,
    kind: str,
    points: Mapping[str, dict[int, float]],
    notes: Iterable[str],
    candidates: Iterable[HostLogs],
) -> Run:
    """Return a run from what a reader found.

    Args:
        name: short name.
        path: the file or folder.
        kind: the format, in words.
        points: values by step, by the name of the metric as it is in the log.
        notes: what was left out.
        candidates: the frameworks that may have written it.
    """
    joined: dict[str, dict[int, float]] = {}
    for key, values in points.items():
        joined.setdefault(canonical(key), {}).update(values)
    series = {key: series_of(values) for key, values in joined.items() if values}
    logs = recognise(series, candidates)
    return Run(name, path, kind, series, tuple(notes), logs, known_metrics(series, logs))


def is_ours(key: str) -> bool:
    """Say whether a metric is one of kl-plugins."""
    return key.startswith(OURS)


def meaning(key: str) -> str:
    """Return the meaning of a metric of kl-plugins, or an empty text if this version does not know it."""
    return "the coefficient that was applied" if key == BETA else {**MEANINGS, **AGE, **OBSERVATION}.get(key, "")


def unit(key: str) -> str:
    """Return the unit of a metric of kl-plugins: ``nats``, ``share``, or an empty text for a plain number."""
    words = meaning(key)
    if "over kl/value" in words:
        return ""
    if "nats" in words:
        return "nats"
    return "share" if words.startswith(("share", "effective share")) else ""
