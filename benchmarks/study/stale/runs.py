"""The runs of the plan. This module lists them, makes those that are missing, and returns their records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from benchmarks.study.comparison import Options, complete
from benchmarks.study.plan import Run
from benchmarks.study.settings import run_key, sources

from .arms import Batch, Place

Key = tuple[Place, str, int]
"""The place, arm and seed of a run."""
Found = dict[Key, dict[str, Any]]
"""The records of runs, by place, arm and seed."""


def planned(batch: Batch, options: Options, code: str) -> dict[Key, Run]:
    """Return the runs of a batch by place, arm and seed, in the order of their seeds.

    Args:
        batch: a batch of the plan.
        options: options of the study. No batch gets more seeds than they allow.
        code: digest from `settings.sources`.
    """
    made = {}
    for seed in range(1, min(batch.seeds, options.seeds) + 1):
        for place in batch.places:
            for arm in batch.arms:
                cell = place.cell(arm)
                key = run_key(batch.settings, cell, seed, code)
                file = options.folder / "runs" / f"{cell.slug}-seed{seed}-{key[:8]}.json"
                made[place, arm, seed] = Run(cell, seed, key, file)
    return made


def records(console: Console, batches: Sequence[Batch], options: Options) -> Found:
    """Make the missing runs of all batches, and return the records of all batches.

    The function makes no runs if the options forbid it.

    Args:
        console: the console that receives the output.
        batches: batches of the plan, in the order in which they are made.
        options: options of the study.
    """
    code = sources("trl")
    found: Found = {}
    for batch in batches:
        runs = planned(batch, options, code)
        seeds = min(batch.seeds, options.seeds)
        made = complete(console, list(runs.values()), batch.settings, replace(options, seeds=seeds), code)
        found |= {key: made.found[run.key] for key, run in runs.items() if run.key in made.found}
    return found
