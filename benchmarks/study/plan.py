"""The runs that a study needs, the runs that exist already, and the cost of the missing runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.reporting import finished

from .claims import CLAIMS
from .settings import Cell, Settings, reference_key, run_key
from .verdicts import Claim, Point

SECONDS_PER_STEP = 0.13  # of a tiny model on one core, measurements included; used until a finished run exists
SECONDS_PER_PRETRAIN_STEP = 0.02
# These are the arms of the curve over all delays, on the task `rare`.
EXTRA_DELAYS = ("none", "k2@loss", "k2@loss/is:token", "k2@loss/is:token/cap:2")


@dataclass(frozen=True)
class Scope:
    """The requested part of the study. An empty tuple stands for everything.

    Attributes:
        tasks, families, arms, delays: the values to run.
        claims: names of claims; only their runs are made, without the curve over all delays.
        host: the host that trains.
    """

    tasks: tuple[str, ...] = ()
    families: tuple[str, ...] = ("qwen2", "llama")
    arms: tuple[str, ...] = ()
    delays: tuple[int, ...] = ()
    claims: tuple[str, ...] = ()
    host: str = "trl"

    def allows(self, cell: Cell) -> bool:
        """Return whether a cell belongs to the requested part."""
        wanted = ((self.tasks, cell.task), (self.arms, cell.arm), (self.delays, cell.delay))
        return all(not some or value in some for some, value in wanted)


@dataclass(frozen=True)
class Run:
    """One run of the plan, and the place of its result."""

    cell: Cell
    seed: int
    key: str
    file: Path

    @property
    def name(self) -> str:
        """Return the run's name for messages and progress."""
        return f"{self.cell.slug} seed {self.seed}"

    def finished(self) -> dict[str, Any] | None:
        """Return the run's result if it is complete and was made with the same key, else None."""
        return finished(self.file, self.key)


def chosen_claims(scope: Scope) -> list[Claim]:
    """Return the requested claims; all claims by default.

    Raises:
        ValueError: if there is no claim with a requested name.
    """
    unknown = set(scope.claims) - {claim.name for claim in CLAIMS}
    if unknown:
        raise ValueError(f"no claim {', '.join(sorted(unknown))}; there is {', '.join(c.name for c in CLAIMS)}")
    return [claim for claim in CLAIMS if not scope.claims or claim.name in scope.claims]


def cell_of(point: Point, task: str, family: str, host: str) -> Cell:
    """Return the cell of a claim's point."""
    return Cell(task, family, point.arm, point.delay, point.precision, host)


def cells(scope: Scope, delays: Sequence[int] = (0, 1, 4, 16)) -> list[Cell]:
    """Return all cells of the chosen claims and of the curve over delays.

    The on-policy and stale runs of the first family come first. The second family repeats the on-policy claims.
    """
    found: dict[Cell, None] = {}
    for family in scope.families:
        for claim in chosen_claims(scope):
            points = claim.plus + claim.minus
            stale = any(p.delay or p.precision != "fp32" for p in points)
            if stale and family != scope.families[0]:
                continue
            found |= {cell_of(p, task, family, scope.host): None for task in claim.tasks for p in points}
        if family == scope.families[0] and not scope.claims:
            found |= {Cell("rare", family, arm, d, "fp32", scope.host): None for arm in EXTRA_DELAYS for d in delays}
    return [cell for cell in found if scope.allows(cell)]


def runs(scope: Scope, seeds: int, settings: Settings, folder: Path, code: str) -> list[Run]:
    """Return all runs, seed by seed, so that an interrupted study has complete comparisons."""
    return [
        Run(cell, seed, key, folder / "runs" / f"{cell.slug}-seed{seed}-{key[:8]}.json")
        for seed in range(1, seeds + 1)
        for cell in cells(scope)
        for key in [run_key(settings, cell, seed, code)]
    ]


@dataclass(frozen=True)
class Reference:
    """A reference model that runs start from."""

    task: str
    family: str
    key: str
    folder: Path

    @property
    def file(self) -> Path:
        """Return the path of the model's description."""
        return self.folder / "reference.json"

    def finished(self) -> dict[str, Any] | None:
        """Return the model's description if the model exists, else None."""
        return finished(self.file, self.key) if (self.folder / "config.json").exists() else None


def references(planned: Iterable[Run], settings: Settings, folder: Path, code: str) -> list[Reference]:
    """Return the reference models of the runs. Other settings give another folder."""
    pairs = dict.fromkeys((run.cell.task, run.cell.family) for run in planned)
    keys = {pair: reference_key(settings, *pair, code) for pair in pairs}
    return [Reference(*pair, key, folder / "references" / f"{'-'.join(pair)}-{key[:8]}") for pair, key in keys.items()]


def estimate(
    missing: Sequence[Run], done: Sequence[dict[str, Any]], models: int, settings: Settings, workers: int
) -> float:
    """Estimate the seconds that the missing runs will take, from the finished runs if there are any.

    Args:
        missing: missing runs.
        done: records of finished runs with the same settings.
        models: missing reference models.
        settings: settings of the study.
        workers: number of processes.
    """
    each = median(r["seconds"] for r in done) if done else settings.steps * SECONDS_PER_STEP
    return (len(missing) * each + models * settings.pretrain_steps * SECONDS_PER_PRETRAIN_STEP) / max(workers, 1)
