"""``kl-plugins report``: reads logs, prints what the rules find in them, and writes one HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from kl_plugins.cli.output import Page, Row, fail, print_json
from kl_plugins.report.charts import charts
from kl_plugins.report.findings import Finding, find
from kl_plugins.report.page import MissingPackageError, last_values, render
from kl_plugins.report.reading import LogError, read_runs
from kl_plugins.report.run import Run

DEFAULT_OUT = "report.html"
STYLES = {"error": "red", "warning": "yellow", "note": "cyan"}


def report_command(arguments: Sequence[str], out: str | None, as_json: bool) -> int:
    """Report on one or more runs.

    Args:
        arguments: paths of logs, each alone or as ``NAME=PATH``.
        out: path of the page; None writes ``report.html``, or no page if JSON is printed.
        as_json: whether to print the findings as JSON.

    Returns:
        0; 2 if a log cannot be read; 1 if a package of the extra is missing, or the page cannot be written.
    """
    try:
        runs = read_runs(arguments)
    except LogError as error:
        return fail(str(error), as_json, 2)
    findings = find(runs)
    if not as_json or out:
        target = Path(out or DEFAULT_OUT)
        try:
            text = render(runs, findings)
            target.write_text(text, encoding="utf-8")
        except MissingPackageError as error:
            return fail(str(error), as_json, 1)
        except OSError as error:
            return fail(
                f"kl-plugins report: the page cannot be written ({error}). Choose a path with --out.", as_json, 1
            )
    if as_json:
        return print_json(_document(runs, findings, out))
    _print(runs, findings)
    print(f"\nwrote {target}")
    return 0


def _document(runs: Sequence[Run], findings: Sequence[Finding], out: str | None) -> dict[str, object]:
    return {
        "runs": [
            {
                "name": run.name,
                "path": str(run.path),
                "format": run.kind,
                "framework": run.logs.title if run.logs else None,
                "active": run.active,
                "steps": run.steps(),
                "notes": run.notes,
            }
            for run in runs
        ],
        "findings": [asdict(finding) for finding in findings],
        "last_values": [
            {
                "key": row.key,
                "unit": row.unit,
                "runs": {run.name: _end(end) for run, end in zip(runs, row.ends, strict=True)},
            }
            for row in last_values(runs, charts(runs))
        ],
        "page": out,
    }


def _end(end: tuple[int, float] | None) -> dict[str, float | None] | None:
    """Return step and value for JSON, which has no NaN and no infinity: they become null."""
    return {"step": end[0], "value": end[1] if math.isfinite(end[1]) else None} if end else None


def _print(runs: Sequence[Run], findings: Sequence[Finding]) -> None:
    page = Page()
    page.title("What the logs say")
    for run in runs:
        who = f"{run.logs.title if run.logs else 'unknown framework'}, {run.kind}"
        rows: list[Row] = [("", f"{who}, kl-plugins {'active' if run.active else 'not active'}")]
        rows += [("", note) for note in run.notes]
        rows += [(finding.level, finding.text) for finding in findings if finding.run == run.name]
        if not any(finding.run == run.name for finding in findings):
            rows.append(("", "No rule found anything, which does not prove that the run is sound."))
        page.section(run.name, rows, STYLES)
