"""Makes the page: findings in words, a table of the runs, the plots, the last values, and the list of all rules."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from kl_plugins import __version__
from kl_plugins.report import figures
from kl_plugins.report.charts import Chart, anchor_of, charts
from kl_plugins.report.findings import Finding, looked_at, number
from kl_plugins.report.rules import LEVELS, RULES
from kl_plugins.report.run import Run
from kl_plugins.report.styles import DASHES, MARKS, style

TEMPLATE = Path(__file__).with_name("page.html")
REMEDY = 'pip install "kl-plugins[report]"'


class LastValues(NamedTuple):
    """Last step and value of one metric in each run; None where a run has not logged it."""

    key: str
    unit: str
    ends: tuple[tuple[int, float] | None, ...]


class MissingPackageError(RuntimeError):
    """A package of the extra ``report`` is not installed; the message says which one and how to install it."""


def render(runs: Sequence[Run], findings: Sequence[Finding], now: datetime | None = None) -> str:
    """Return the page as HTML. It needs no other file and loads nothing from a network.

    Args:
        runs: the runs, which are drawn into the same plots.
        findings: what :func:`kl_plugins.report.findings.find` found in them.
        now: the time that the page names; by default the present.

    Raises:
        MissingPackageError: plotly or jinja2 is not installed.
    """
    try:
        from jinja2 import Environment
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingPackageError(
            f"kl-plugins report: the page needs plotly and jinja2 ({error}). Install them: {REMEDY}. "
            "With --json, the findings are printed without them."
        ) from error
    sections = charts(runs)

    def plot(chart: Chart) -> dict[str, Any]:
        names, keys = {line.name for line in chart.lines}, {line.key for line in chart.lines}
        about = [finding for finding in findings if finding.key in keys and finding.run in names]
        return {
            "chart": chart,
            "static": Markup(figures.static(chart)),  # both escape what comes from a log
            "interactive": Markup(figures.interactive(chart, about)),
        }

    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    return page.render(
        version=__version__,
        made=f"{now or datetime.now(timezone.utc):%d %B %Y, %H:%M} UTC",
        plotly=Markup(get_plotlyjs()),
        runs=[_shown(index, run) for index, run in enumerate(runs)],
        groups=[
            {"first": group[0], "rows": [(finding, anchor_of(finding.key, sections)) for finding in group]}
            for group in grouped(findings)
        ],
        counts=[(level, sum(finding.level == level for finding in findings)) for level in LEVELS],
        sections=[(heading, [plot(chart) for chart in plots]) for heading, plots in sections],
        values=last_values(runs, sections),
        number=number,
        rules=rule_rows(runs, findings),
        width=figures.WIDTH,
        height=figures.HEIGHT,
    )


def grouped(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Return the findings of each rule together, so that the page says once what can be done about them."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.rule, []).append(finding)
    return list(groups.values())


def last_values(runs: Sequence[Run], sections: Sequence[tuple[str, Sequence[Chart]]]) -> list[LastValues]:
    """Return the last value of each metric that the page shows, in the order of the plots."""
    rows = []
    for _, plots in sections:
        for chart in plots:
            for key in dict.fromkeys(line.key for line in chart.lines):
                ends = tuple(run.series[key].last() if key in run.series else None for run in runs)
                rows.append(LastValues(key, chart.unit, ends))
    return rows


def rule_rows(runs: Sequence[Run], findings: Sequence[Finding]) -> list[dict[str, str]]:
    """Return one row per rule: its condition, its source, and in which runs it was found, or why not."""
    rows = []
    for rule in RULES:
        found = sorted({finding.run for finding in findings if finding.rule == rule.name})
        looked = any(looked_at(rule, run) for run in runs)
        result = f"found in {', '.join(found)}" if found else "not found" if looked else "metric not in the logs"
        rows.append({"condition": rule.condition, "source": rule.source, "level": rule.level, "result": result})
    return rows


def _shown(index: int, run: Run) -> dict[str, Any]:
    look, steps = style(index), run.steps()
    return {
        "run": run,
        "colour": look.colour,
        "dash": DASHES[look.dash],
        "mark": MARKS[look.marker],
        "host": run.logs.title if run.logs else "unknown",
        "steps": f"{steps[0]} to {steps[1]}" if steps else "none",
    }
