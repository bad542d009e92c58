"""What a framework's own metrics mean. Each host says it in the module ``logs`` of its adapter, in plain strings.

The module is found through the entry points of the hosts. Nothing of a host is imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from kl_plugins.hosts import installed_hosts

Role = Literal["reward", "kl", "other_kl", "beta", "entropy", "grad_norm"]
"""What a metric stands for: ``kl`` is a KL to the reference, ``other_kl`` is one between two other policies."""

PREFIX = "train/"
"""What loggers of several frameworks put before the name of a training metric."""

UNIVERSAL: dict[str, Role] = {
    "reward": "reward",
    "kl": "kl",
    "beta": "beta",
    "entropy": "entropy",
    "grad_norm": "grad_norm",
}
"""Names that are understood in the log of an unknown framework."""

UNKNOWN = "This page does not know which program wrote this log, so it cannot say which estimator that is."


@dataclass(frozen=True)
class NativeMetric:
    """A metric that a framework logs by itself.

    Attributes:
        key: its name, without the prefix of a logger.
        role: what it stands for.
        meaning: which estimator or mean it is, as a sentence without its subject, for example "is the mean of k3".
    """

    key: str
    role: Role
    meaning: str = ""


@dataclass(frozen=True)
class HostLogs:
    """What the logs of one framework look like.

    Attributes:
        title: how the framework spells its name.
        marks: names of metrics, or their beginnings up to a ``/``, that show that a log is from this framework.
        metrics: the metrics that the page shows.
    """

    title: str
    marks: tuple[str, ...]
    metrics: tuple[NativeMetric, ...]

    def score(self, keys: Iterable[str]) -> int:
        """Return how many marks a log with these metrics has."""
        present = set(keys)
        return sum(
            mark in present or (mark.endswith("/") and any(key.startswith(mark) for key in present))
            for mark in self.marks
        )


class Known(NamedTuple):
    """A metric of a log that the page knows: its role, and its meaning if a host gives one."""

    role: Role
    meaning: str


def canonical(key: str) -> str:
    """Return the name of a training metric without the prefix of a logger."""
    return key.removeprefix(PREFIX)


def host_logs() -> list[HostLogs]:
    """Return what every installed adapter says about its host's logs; an adapter without such a module is left out."""
    found = []
    for host in installed_hosts().values():
        name = f"{host.module}.logs"
        try:
            found.append(importlib.import_module(name).LOGS)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    return [logs for logs in found if isinstance(logs, HostLogs)]


def recognise(keys: Iterable[str], candidates: Iterable[HostLogs]) -> HostLogs | None:
    """Return the one framework whose marks a log has most of, or None.

    Args:
        keys: names of the metrics in the log, without prefixes.
        candidates: what :func:`host_logs` gives.
    """
    keys = list(keys)
    scored = sorted(((logs.score(keys), logs) for logs in candidates), key=lambda pair: -pair[0])
    if not scored or not scored[0][0] or (len(scored) > 1 and scored[1][0] == scored[0][0]):
        return None
    return scored[0][1]


def known_metrics(keys: Iterable[str], logs: HostLogs | None) -> Mapping[str, Known]:
    """Return role and meaning of the metrics of a log that the page knows.

    Args:
        keys: names of the metrics in the log, without prefixes.
        logs: the framework that wrote it, or None if that is unknown.
    """
    if logs is None:
        return {key: Known(UNIVERSAL[key], "") for key in keys if key in UNIVERSAL}
    table = {metric.key: Known(metric.role, metric.meaning) for metric in logs.metrics}
    return {key: table[key] for key in keys if key in table}
