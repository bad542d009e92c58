"""The results of the runs: measures per cell, a verdict per claim, task and model family, a table and a sentence."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import mean
from typing import Any

from rich import box
from rich.table import Table

from .plan import Run, cell_of
from .settings import Cell, Settings
from .verdicts import REFUTED, REPRODUCED, UNDECIDED, Claim, interval, judge, measures

Measured = dict[Cell, dict[int, dict[str, float]]]  # by seed


def summarise(
    planned: Sequence[Run], found: Mapping[str, dict[str, Any]], claims: Sequence[Claim],
    references: Mapping[tuple[str, str], dict[str, Any] | None], settings: Settings,
) -> dict[str, Any]:  # fmt: skip
    """Return all parts of `study.json` that come from the runs.

    Args:
        planned: the runs.
        found: records of the runs, by key.
        claims: claims to judge.
        references: descriptions of the models, by task and family.
        settings: settings of the study.
    """
    measured: Measured = {}
    curves: dict[Cell, list[list[dict[str, Any]]]] = {}
    for run in planned:
        if run.key in found:
            record = found[run.key]
            measured.setdefault(run.cell, {})[run.seed] = measures(record, settings.beta)
            curves.setdefault(run.cell, []).append(record["curve"])
    hosts = {cell.host for cell in measured}
    return {
        "references": [
            {k: v for k, v in found.items() if k not in ("machine", "key", "plugin_log")}
            for found in references.values()
            if found
        ],
        "cells": [
            {
                **asdict(cell),
                "seeds": sorted(by_seed),
                "measures": {name: [by_seed[s][name] for s in sorted(by_seed)] for name in by_seed[min(by_seed)]},
                "curves": _means(curves[cell]),
            }
            for cell, by_seed in measured.items()
        ],
        "claims": [
            row
            for claim in claims
            for task in claim.tasks
            for family in dict.fromkeys(cell.family for cell in measured)
            for host in sorted(hosts)
            if (row := _judged(claim, task, family, host, measured)) is not None
        ],
        "run_seconds": [round(record["seconds"], 1) for record in found.values()],
    }


def _judged(claim: Claim, task: str, family: str, host: str, measured: Measured) -> dict[str, Any] | None:
    """Return a claim's row, over the seeds that all its points have; None if the plan lacks one of its points."""
    cells = {point: cell_of(point, task, family, host) for point in claim.plus + claim.minus}
    if any(cell not in measured for cell in cells.values()):
        return None
    seeds = sorted(set.intersection(*(set(measured[cell]) for cell in cells.values())))
    effects = [claim.effect({point: measured[cell][seed] for point, cell in cells.items()}) for seed in seeds]
    return {
        "claim": claim.name, "source": claim.source, "says": claim.says, "rule": claim.rule, "task": task,
        "family": family, "host": host, "seeds": seeds, "log": claim.log, "direction": claim.direction,
        "threshold": claim.threshold, **_plain(asdict(judge(claim, effects))),
    }  # fmt: skip


def _plain(verdict: dict[str, Any]) -> dict[str, Any]:
    """Return the verdict without NaN, which JSON cannot hold."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in verdict.items()}


def _means(curves: list[list[dict[str, Any]]]) -> dict[str, list[Any]]:
    """Return the steps, and mean, lowest and highest value over seeds of the plotted measures."""
    columns = list(zip(*curves, strict=True))
    found: dict[str, list[Any]] = {"step": [column[0]["step"] for column in columns]}
    for name in ("reward", "kl", "entropy"):
        values = [[point[name] for point in column] for column in columns]
        found |= {name: [mean(v) for v in values], f"{name} low": [*map(min, values)]}
        found[f"{name} high"] = [*map(max, values)]
    return found


def table(data: Mapping[str, Any]) -> Table:
    """Make a table with one row per claim, task and family."""
    made = Table(title="Claims, each with the test that was stated before the runs", box=box.SIMPLE, padding=(0, 1))
    for column in ("claim", "task", "model"):
        made.add_column(column, no_wrap=True)
    made.add_column("effect [95 %]", justify="right", no_wrap=True)
    made.add_column("verdict", no_wrap=True)
    colours = {REPRODUCED: "green", REFUTED: "red", UNDECIDED: "yellow"}
    for row in data["claims"]:
        verdict = f"[{colours[row['verdict']]}]{row['verdict']}[/]"
        made.add_row(row["claim"], row["task"], row["family"], interval(row), verdict)
    return made


def sentence(data: Mapping[str, Any], smoke: bool = False) -> str:
    """Return a sentence that says how many tests had each result."""
    counts = Counter(row["verdict"] for row in data["claims"])
    parts = [f"{counts[v]} {v}" for v in (REPRODUCED, REFUTED, UNDECIDED)]
    said = f"Of {counts.total()} tests: {', '.join(parts)}."
    return f"{said} This was a smoke run: its verdicts mean nothing." if smoke else said
