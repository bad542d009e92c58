"""Which runs a study needs, which of them are there, and what the rest will cost."""

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

SECONDS_PER_STEP = 0.13  # of a tiny model on one core, measurements included; used until a run is there to go by
SECONDS_PER_PRETRAIN_STEP = 0.02
# Arms of the curve over all delays, on the task `rare`.
EXTRA_DELAYS = ("none", "k2@loss", "k2@loss/is:token", "k2@loss/is:token/cap:2")


@dataclass(frozen=True)
class Scope:
    """What of the study is wanted; everything where a tuple is empty.

    Attributes:
        tasks, families, arms, delays: what is to be run.
        claims: names; their runs alone, without the curve over all delays.
        host: that trains.
    """

    tasks: tuple[str, ...] = ()
    families: tuple[str, ...] = ("qwen2", "llama")
    arms: tuple[str, ...] = ()
    delays: tuple[int, ...] = ()
    claims: tuple[str, ...] = ()
    host: str = "trl"

    def allows(self, cell: Cell) -> bool:
        """Whether a cell is wanted."""
        wanted = ((self.tasks, cell.task), (self.arms, cell.arm), (self.delays, cell.delay))
        return all(not some or value in some for some, value in wanted)


@dataclass(frozen=True)
class Run:
    """One run of the plan and where its result lies."""

    cell: Cell
    seed: int
    key: str
    file: Path

    @property
    def name(self) -> str:
        """For messages and progress."""
        return f"{self.cell.slug} seed {self.seed}"

    def finished(self) -> dict[str, Any] | None:
        """Its result, if it was made under this very key and is whole."""
        return finished(self.file, self.key)


def chosen_claims(scope: Scope) -> list[Claim]:
    """The claims that were asked for; all by default.

    Raises:
        ValueError: there is no claim of that name.
    """
    unknown = set(scope.claims) - {claim.name for claim in CLAIMS}
    if unknown:
        raise ValueError(f"no claim {', '.join(sorted(unknown))}; there is {', '.join(c.name for c in CLAIMS)}")
    return [claim for claim in CLAIMS if not scope.claims or claim.name in scope.claims]


def cell_of(point: Point, task: str, family: str, host: str) -> Cell:
    """The cell of a claim's point."""
    return Cell(task, family, point.arm, point.delay, point.precision, host)


def cells(scope: Scope, delays: Sequence[int] = (0, 1, 4, 16)) -> list[Cell]:
    """All cells that the chosen claims need, and the curve over delays; on-policy and stale runs of one family first.

    The second family repeats the on-policy claims.
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
    """All runs, seed by seed, so that an interrupted study has whole comparisons."""
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
        """Its description."""
        return self.folder / "reference.json"

    def finished(self) -> dict[str, Any] | None:
        """Its description, if the model is there."""
        return finished(self.file, self.key) if (self.folder / "config.json").exists() else None


def references(planned: Iterable[Run], settings: Settings, folder: Path, code: str) -> list[Reference]:
    """The reference models of the runs; another setting makes another folder."""
    pairs = dict.fromkeys((run.cell.task, run.cell.family) for run in planned)
    keys = {pair: reference_key(settings, *pair, code) for pair in pairs}
    return [Reference(*pair, key, folder / "references" / f"{'-'.join(pair)}-{key[:8]}") for pair, key in keys.items()]


def estimate(
    missing: Sequence[Run], done: Sequence[dict[str, Any]], models: int, settings: Settings, workers: int
) -> float:
    """Seconds that the missing runs will take, by the finished ones where there are any.

    Args:
        missing: runs to be made.
        done: records of finished runs under the same settings.
        models: references to be made.
        settings: of the study.
        workers: processes.
    """
    each = median(r["seconds"] for r in done) if done else settings.steps * SECONDS_PER_STEP
    return (len(missing) * each + models * settings.pretrain_steps * SECONDS_PER_PRETRAIN_STEP) / max(workers, 1)
