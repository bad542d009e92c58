"""Makes tables from results. Most files are lists of rows; other files have their own functions here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from benchmarks.overhead.report import TITLES, cells
from benchmarks.staleness.findings import shown
from benchmarks.study.verdicts import interval

SCALARS = (str, int, float, bool)
MOST_COLUMNS = 16
SKIPPED = ("machine", "versions", "peers")


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: heading.
        columns: names of the columns.
        rows: cells of each row.
        marks: CSS class of each row; empty if no row has one.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    marks: Sequence[str] = ()

    def marked(self) -> list[tuple[str, Sequence[str]]]:
        """Return the rows with their CSS classes."""
        return list(zip(self.marks or [""] * len(self.rows), self.rows, strict=True))


def text(value: Any) -> str:
    """Return a value as text, a float with four digits."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the scalars of a row; those of nested mappings get dotted names, and lists of at most four become text."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            found |= flat(value, f"{key}.")
        elif value is None or isinstance(value, SCALARS):
            found[key] = value
        elif isinstance(value, list) and 0 < len(value) <= 4 and all(isinstance(v, SCALARS) for v in value):
            found[key] = " / ".join(map(text, value))
    return found


def table_of(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Make a table from rows; columns that no row fills are left out, and quartiles if there are too many columns."""
    flattened = [flat(row) for row in rows]
    columns = list(dict.fromkeys(name for row in flattened for name in row))
    columns = [c for c in columns if any(row.get(c) is not None for row in flattened)]
    columns = [c for i, c in enumerate(columns) if not any(_says_the_same(flattened, c, o) for o in columns[:i])]
    if len(columns) > MOST_COLUMNS:
        columns = [c for c in columns if not c.endswith((".lower", ".upper"))][:MOST_COLUMNS]
    return Table(title, columns, [[text(row.get(column)) for column in columns] for row in flattened])


def _says_the_same(rows: Sequence[Mapping[str, Any]], column: str, other: str) -> bool:
    """Return whether two columns have the same text in every row, as for a case whose name is its spec."""
    return all(isinstance(row.get(column), str) and row[column] == row.get(other) for row in rows)


def tables_of(data: Mapping[str, Any], title: str = "") -> list[Table]:
    """Make a table from every list of rows at any depth of a file, and from every mapping of names to rows."""
    found: list[Table] = []
    title = " – ".join(filter(None, (title, str(data.get("title", "")))))
    for name, value in data.items():
        if name in SKIPPED:
            continue
        heading = " – ".join(filter(None, (title, name.replace("_", " "))))
        if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
            # A mapping of mappings inside a row is a group of columns, unless its name is "rows".
            nested = [row for row in value if any(_is_rows(v) for k, v in row.items() if k == "rows" or _is_list(v))]
            if nested:
                for row in nested:
                    found += tables_of(row, heading if "title" not in row else "")
            else:
                found.append(table_of(heading, value))
        elif isinstance(value, Mapping) and _is_rows(value):
            found.append(table_of(heading, [{"name": key, **row} for key, row in value.items()]))
    return found


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_rows(value: Any) -> bool:
    """Return whether a value is a list of mappings, or a mapping of mappings."""
    items = value if isinstance(value, list) else list(value.values()) if isinstance(value, Mapping) else []
    return bool(items) and all(isinstance(item, Mapping) for item in items)


def overhead_tables(data: Mapping[str, Any]) -> list[Table]:
    """Make the table of the time and memory that each spec adds to a step."""
    return [Table("one optimizer step", TITLES, [cells(row) for row in data["rows"]])]


def staleness_tables(data: Mapping[str, Any]) -> list[Table]:
    """Make the tables of the findings, and of the share of runs that ran away by term in every sweep."""
    found = [Table("findings", ("finding",), [(finding["says"],) for finding in data["findings"]])]
    for name, sweep in data["sweeps"].items():
        by_term: dict[str, list[str]] = {}
        for row in sweep["rows"]:
            by_term.setdefault(row["arm"], []).append(shown(row))
        columns = ("term", *(f"{value:g}" for value in sweep["values"]))
        title = f"ran away – {name}: {sweep['title']}"
        found.append(Table(title, columns, [(term, *shares) for term, shares in by_term.items()]))
    return found


def study_tables(data: Mapping[str, Any]) -> list[Table]:
    """Make the tables of the verdicts, of the measures per cell, and of the reference models."""
    claims = data["claims"]
    verdicts = Table(
        "verdicts", ("claim", "source", "task", "model", "test", "seeds", "effect [95 %]", "verdict"),
        [
            (row["says"], row["source"], row["task"], row["family"], row["rule"], str(len(row["seeds"])),
             interval(row), row["verdict"])
            for row in claims
        ],
        [row["verdict"].replace(" ", "-") for row in claims],
    )  # fmt: skip
    names = ("reward", "kl", "entropy", "objective")
    cells = Table(
        "ends of the runs: mean ± standard deviation over seeds",
        ("task", "model", "arm", "delay", "sampler", "seeds", *names),
        [
            (c["task"], c["family"], c["arm"], str(c["delay"]), c["precision"], str(len(c["seeds"])),
             *(_spread(c["measures"][name]) for name in names))
            for c in data["cells"]
        ],
    )  # fmt: skip
    return [verdicts, cells, table_of("reference models", data["references"])]


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
