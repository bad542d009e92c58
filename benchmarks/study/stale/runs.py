"""The runs of the plan: which there are, the making of those that are missing, and their records."""

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
"""Place, arm and seed."""
Found = dict[Key, dict[str, Any]]
"""Records of runs."""


def planned(batch: Batch, options: Options, code: str) -> dict[Key, Run]:
    """The runs of a batch by place, arm and seed, seed by seed.

    Args:
        batch: of the plan.
        options: of the study; its seeds are the most that any batch gets.
        code: from `settings.sources`.
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
    """The records of all batches, after the missing runs were made, unless the options say not to make any.

    Args:
        console: to write to.
        batches: of the plan, in the order in which they are made.
        options: of the study.
    """
    code = sources("trl")
    found: Found = {}
    for batch in batches:
        runs = planned(batch, options, code)
        seeds = min(batch.seeds, options.seeds)
        made = complete(console, list(runs.values()), batch.settings, replace(options, seeds=seeds), code)
        found |= {key: made.found[run.key] for key, run in runs.items() if run.key in made.found}
    return found
