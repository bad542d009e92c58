"""Logs of real runs, as their frameworks wrote them, and hand-made series.

The folder ``logs`` holds the first steps of runs with tiny models: of TRL 1.16 and veRL 0.9, each under the spec
``default`` and without kl-plugins, with numbers rounded to four digits; and of OpenRLHF 0.11 under ``default``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from kl_plugins.report.series import Series

LOGS = Path(__file__).with_name("logs")


def series(*values: float, first: int = 1) -> Series:
    """Return a series with one value per step."""
    return Series(tuple(range(first, first + len(values))), tuple(float(value) for value in values))


def write_lines(path: Path, columns: Mapping[str, Sequence[float | None]], first: int = 1) -> Path:
    """Write a JSON-lines file with one column per metric and one line per step."""
    rows = zip(*columns.values(), strict=True)
    entries = [{"step": first + i, **dict(zip(columns, row, strict=True))} for i, row in enumerate(rows)]
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries), encoding="utf-8")
    return path
