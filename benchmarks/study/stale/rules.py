"""What *ran away* means, and the rule by which the default is chosen. Fixed before the runs.

The values of earlier runs were known (docs/results.md): at delay 16 every held policy keeps little of its reward, so
that a third of it can be lost by a term that holds ever more tightly, which is no running away. So both halves of the
definition are counted, and the third level below looks at them apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from benchmarks.intervals import student

from .arms import ELIGIBLE, LOCAL, NONE, TODAY, UNWEIGHTED, Place

FROM = 60
"""The first step at which a KL is compared: before, runs without a KL term have not left either."""
KEPT = 1 / 3
"""Share of its reward with fresh data that a run has to keep."""
MARGIN = 0.02
"""A difference of E[R] - beta KL that matters."""
CONFIDENCE = 0.95

Found = Mapping[tuple[Place, str, int], Mapping[str, Any]]
"""Records of runs by place, arm and seed."""


@dataclass(frozen=True)
class Outcome:
    """What became of one run.

    Attributes:
        place, arm, seed: which.
        reward, kl, objective: at the end; the last is E[R] - beta KL.
        excursion: the largest KL beyond that of the same seed's run without a KL term, at any measurement from step
            `FROM` on, nats; negative where it was always below.
        kept: the reward at the end over that of the same arm and seed with fresh data; None where it has none.
    """

    place: Place
    arm: str
    seed: int
    reward: float
    kl: float
    objective: float
    excursion: float
    kept: float | None

    @property
    def above(self) -> bool:
        """Whether the KL was above that of the run without a KL term."""
        return self.excursion > 0

    @property
    def lost(self) -> bool:
        """Whether it lost its reward."""
        return self.kept is not None and self.kept < KEPT

    @property
    def ran_away(self) -> bool:
        """Either of the two."""
        return self.above or self.lost


def outcomes(found: Found, beta: float) -> list[Outcome]:
    """One per run that has a KL term and whose partners are there: the run without one, and the one with fresh data."""
    made = []
    for (place, arm, seed), record in found.items():
        without, fresh = found.get((place, NONE, seed)), found.get((place.fresh, arm, seed))
        if arm == NONE or without is None or fresh is None:
            continue
        end, start = record["curve"][-1], fresh["curve"][-1]
        unheld = {point["step"]: point["kl"] for point in without["curve"]}
        made.append(Outcome(
            place, arm, seed, end["reward"], end["kl"], end["reward"] - beta * end["kl"],
            max(point["kl"] - unheld[point["step"]] for point in record["curve"] if point["step"] >= FROM),
            end["reward"] / max(start["reward"], 1e-12) if place.delay else None,
        ))  # fmt: skip
    return made


def upper_bound(count: int, of: int) -> float:
    """One-sided 95 % upper bound of a share, Clopper and Pearson's: the share under which so few are this unlikely.

    Args:
        count: how many.
        of: of how many, at least one.
    """
    if count >= of:
        return 1.0
    low, high = count / of, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        below = sum(math.comb(of, k) * middle**k * (1 - middle) ** (of - k) for k in range(count + 1))
        low, high = (middle, high) if below > 1 - CONFIDENCE else (low, middle)
    return high


@dataclass(frozen=True)
class Shortfall:
    """How far an arm's E[R] - beta KL lies below that of the best token-local arm in one place, seeds paired.

    Attributes:
        place: where.
        best: that arm, by its mean.
        mean: over seeds.
        low, high: 95 % interval of the mean by Student's t; infinite with fewer than two seeds.
    """

    place: Place
    best: str
    mean: float
    low: float
    high: float


def shortfalls(arm: str, known: Iterable[Outcome]) -> list[Shortfall]:
    """One per place in which the arm was run."""
    by_place: dict[Place, dict[str, dict[int, float]]] = {}
    for outcome in known:
        by_place.setdefault(outcome.place, {}).setdefault(outcome.arm, {})[outcome.seed] = outcome.objective
    made = []
    for place, arms in sorted(by_place.items()):
        if arm not in arms:
            continue
        best = max((local for local in LOCAL if local in arms), key=lambda local: mean(arms[local].values()))
        seeds = sorted(arms[best].keys() & arms[arm].keys())
        gaps = [arms[best][seed] - arms[arm][seed] for seed in seeds]
        if not gaps:
            continue
        low, high = student(gaps) if len(gaps) > 1 else (-math.inf, math.inf)
        made.append(Shortfall(place, best, mean(gaps), low, high))
    return made


LEVELS = {
    1: "ran away in no run, and its mean is within the margin of the best arm's in every place",
    2: "ran away in no run, and in no place is it worse by more than the margin with 95 % confidence",
    3: "its KL was above that of no KL term in no run, it lost its reward in no more runs than the unweighted term, "
    "and in no place is it worse by more than the margin with 95 % confidence",
}
"""How well an arm does, best first; 0 stands for none of them."""


def level(arm: str, known: Sequence[Outcome]) -> int:
    """The best of `LEVELS` that an arm reaches; 0 where it reaches none."""
    mine = [outcome for outcome in known if outcome.arm == arm]
    gaps = shortfalls(arm, known)
    if not mine or not gaps or any(gap.low > MARGIN for gap in gaps):
        return 0
    if not any(outcome.ran_away for outcome in mine):
        return 1 if all(gap.mean <= MARGIN for gap in gaps) else 2
    where = {(outcome.place, outcome.seed) for outcome in mine}
    unweighted = [o for o in known if o.arm == UNWEIGHTED and (o.place, o.seed) in where]
    lost = sum(outcome.lost for outcome in mine)
    held = not any(outcome.above for outcome in mine) and lost <= sum(outcome.lost for outcome in unweighted)
    return 3 if held else 0


def order(known: Sequence[Outcome]) -> list[tuple[str, int]]:
    """Candidates with their levels, the default first; empty where none reaches any level.

    The best level that some candidate reaches counts first, then the smallest bias: today's, then the lowest floor.
    """
    levels = {arm: level(arm, known) for arm in ELIGIBLE}
    reached = [(arm, found) for arm, found in levels.items() if found]
    return sorted(reached, key=lambda pair: pair[1])  # stable: by bias within a level


def choose(known: Sequence[Outcome]) -> str:
    """The default; today's where no candidate reaches any level."""
    ranked = order(known)
    return ranked[0][0] if ranked else TODAY


def second_choice(known: Sequence[Outcome]) -> str | None:
    """The candidate that is confirmed where none reaches any level; None where there is none.

    **Added when the selection had shown that none does, before any run of the confirmation was looked at.** Of the
    candidates whose KL was above that of no KL term in no run, those that lost their reward in the fewest runs; of
    these, the one with the smallest bias. How far it falls short of the best arm is reported and decides nothing.
    """
    above = {outcome.arm for outcome in known if outcome.above}
    lost = {arm: sum(o.lost for o in known if o.arm == arm) for arm in ELIGIBLE if arm not in above}
    return min(lost, key=lambda arm: lost[arm]) if lost else None


def second_confirmed(arm: str, again: Sequence[Outcome]) -> bool:
    """Whether a second choice holds elsewhere; fixed together with `second_choice`.

    Its KL was above that of no KL term in no run, and it lost its reward in no more runs than the unweighted term.
    """
    mine = [outcome for outcome in again if outcome.arm == arm]
    where = {(outcome.place, outcome.seed) for outcome in mine}
    unweighted = sum(o.lost for o in again if o.arm == UNWEIGHTED and (o.place, o.seed) in where)
    return bool(mine) and not any(o.above for o in mine) and sum(o.lost for o in mine) <= unweighted


def confirmed(arm: str, selected: Sequence[Outcome], again: Sequence[Outcome]) -> bool:
    """Whether a choice does elsewhere as well as where it was chosen, noise allowed for: at least level 2, or 3.

    Where it is not, the next candidate in the order is confirmed in turn; where none is, today's default stays.
    """
    needed = max(level(arm, selected), 2)
    return 0 < level(arm, again) <= needed
