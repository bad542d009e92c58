"""Tables of what ``kl-plugins report`` reads and looks for."""

from __future__ import annotations

from kl_plugins.report.native import host_logs
from kl_plugins.report.rules import RULES
from tests.pages.parts import table

ROLES = {"kl": "a KL to the reference", "other_kl": "a KL between two other policies"}


def rules() -> str:
    """Return a table of all rules of the report."""
    rows = [(rule.condition, rule.level, rule.remedy, rule.source) for rule in RULES]
    return table(("condition", "level", "what to do", "source"), rows)


def native() -> str:
    """Return a table of what the frameworks' own KL metrics mean."""
    rows = [
        (logs.title, f"`{metric.key}`", ROLES[metric.role], metric.meaning)
        for logs in sorted(host_logs(), key=lambda logs: logs.title.lower())
        for metric in logs.metrics
        if metric.role in ROLES
    ]
    return table(("framework", "metric", "is", "it"), rows)
