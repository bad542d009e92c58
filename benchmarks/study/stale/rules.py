"""The meaning of *ran away*, and the rule by which the default is chosen.

Both were fixed before the runs, except for the second choice (see `second_choice`). The values of earlier runs were
known (docs/results.md). In these runs, at delay 16, every policy that its KL term holds near the reference keeps little
of its reward. So a term that holds the policy more and more tightly can leave a run with less than a third of its
reward with fresh data, although the policy moves towards the reference and not away. For this reason, both halves of
the definition are counted, and the third level below looks at them separately.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from benchmarks.intervals import student

from .arms import ELIGIBLE, LOCAL, NONE, TODAY, TOP_K, UNWEIGHTED, Place

FROM = 60
"""The first step at which KLs are compared. Before it, even runs without a KL term have not left the reference."""
KEPT = 1 / 3
"""The share that a run has to keep of the reward that the same arm and seed reach with fresh data."""
MARGIN = 0.02
"""The margin: a difference in E[R] - beta KL matters if it is larger than this."""
CONFIDENCE = 0.95

Found = Mapping[tuple[Place, str, int], Mapping[str, Any]]
"""Records of runs by place, arm and seed."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one run.

    Attributes:
        place, arm, seed: place, arm and seed of the run.
        reward: reward at the end.
        kl: KL at the end, nats.
        objective: E[R] - beta KL at the end.
        excursion: the largest difference between the KL of this run and the KL of the same seed's run without a KL
            term, over all measurements from step `FROM` on, nats. It is negative if the KL was always below.
        kept: the reward at the end, divided by that of the same arm and seed with fresh data. It is None for a run
            that itself has fresh data.
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
        """Return whether the KL was above that of the run without a KL term, at any measurement from `FROM` on."""
        return self.excursion > 0

    @property
    def lost(self) -> bool:
        """Return whether the run lost its reward: whether it kept less than `KEPT` of the reward with fresh data."""
        return self.kept is not None and self.kept < KEPT

    @property
    def ran_away(self) -> bool:
        """Return whether the KL was above, or the reward was lost, or both."""
        return self.above or self.lost


def outcomes(found: Found, beta: float) -> list[Outcome]:
    """Return the outcome of every run that has a KL term and both of its partners.

    The partners are the run without a KL term and the run with fresh data.

    Args:
        found: records of the runs.
        beta: coefficient of the KL term.
    """
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
    """Return the one-sided 95 % upper bound of a share, by Clopper and Pearson.

    If the true share were this bound, the probability of `count` cases or fewer would be 5 %.

    Args:
        count: number of cases.
        of: number of runs, at least one.
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
    """The shortfall of an arm in one place: how far its E[R] - beta KL lies below that of the best token-local arm.

    The two arms are compared seed by seed.

    Attributes:
        place: the place.
        best: the token-local arm with the highest mean.
        mean: mean shortfall over the seeds.
        low, high: 95 % interval of the mean by Student's t. It is infinite with fewer than two seeds.
    """

    place: Place
    best: str
    mean: float
    low: float
    high: float


def shortfalls(arm: str, known: Iterable[Outcome]) -> list[Shortfall]:
    """Return the shortfall of an arm in every place in which it was run.

    Args:
        arm: the arm.
        known: outcomes of all arms.
    """
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
"""The levels that describe how well an arm does, with the best level first. An arm that reaches none has level 0."""


def level(arm: str, known: Sequence[Outcome]) -> int:
    """Return the best of `LEVELS` that an arm reaches, or 0 if it reaches none.

    Args:
        arm: the arm.
        known: outcomes of all arms.
    """
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
    """Return the candidates that reach a level, each with its level, in the order in which they can be the default.

    The list starts with the default. It is empty if no candidate reaches any level. A better level comes first. Within
    a level, the candidate with the smaller bias comes first: `TODAY`, then the lowest floor.
    """
    levels = {arm: level(arm, known) for arm in ELIGIBLE}
    reached = [(arm, found) for arm, found in levels.items() if found]
    return sorted(reached, key=lambda pair: pair[1])  # The sort is stable, so bias decides within a level.


def choose(known: Sequence[Outcome]) -> str:
    """Return the default. It is `TODAY` if no candidate reaches any level."""
    ranked = order(known)
    return ranked[0][0] if ranked else TODAY


def second_choice(known: Sequence[Outcome]) -> str | None:
    """Return the candidate that is confirmed if no candidate reaches any level, or None if there is no such candidate.

    **This rule was added after the selection had shown that no candidate reaches a level, and before any run of the
    confirmation was looked at.** The rule considers only candidates whose KL was in no run above that of the run
    without a KL term. It chooses the candidate that lost its reward in the fewest runs. If several candidates have the
    same number, it chooses the one with the smallest bias. Its shortfall from the best arm is reported and decides
    nothing.
    """
    above = {outcome.arm for outcome in known if outcome.above}
    lost = {arm: sum(o.lost for o in known if o.arm == arm) for arm in ELIGIBLE if arm not in above}
    return min(lost, key=lambda arm: lost[arm]) if lost else None


def second_confirmed(arm: str, again: Sequence[Outcome]) -> bool:
    """Return whether a second choice holds elsewhere. This rule was fixed together with `second_choice`.

    The choice holds if its KL was in no run above that of the run without a KL term, and if it lost its reward in no
    more runs than the unweighted term did.

    Args:
        arm: the second choice.
        again: outcomes of the confirmation's runs.
    """
    mine = [outcome for outcome in again if outcome.arm == arm]
    where = {(outcome.place, outcome.seed) for outcome in mine}
    unweighted = sum(o.lost for o in again if o.arm == UNWEIGHTED and (o.place, o.seed) in where)
    return bool(mine) and not any(o.above for o in mine) and sum(o.lost for o in mine) <= unweighted


def top_k_holds(known: Sequence[Outcome]) -> dict[str, bool]:
    """Return for each arm with `top:<k>` whether it was stable. This claim was fixed before the first run of the arms.

    The claim is that all of them are stable in the sense of `second_confirmed`: the KL was in no run above that of the
    run without a KL term, and no more runs lost their reward than under the unweighted term. It is an open question for
    the arm with `is:token` and without a floor, because its weighted remainder also becomes weaker for tokens that the
    policy drops, like the plain weight of k2. Its bucket has no weight and is expected to prevent that.

    Args:
        known: outcomes of the runs.
    """
    return {arm: second_confirmed(arm, known) for arm in TOP_K}


def confirmed(arm: str, selected: Sequence[Outcome], again: Sequence[Outcome]) -> bool:
    """Return whether a choice does as well in the confirmation as it did in the selection.

    The choice has to reach level 2 or a better one in the confirmation. Level 3 is enough if it had level 3 in the
    selection. Level 1 is never required, because noise is allowed for. If the choice does not hold, the next candidate
    in the order is put to the confirmation. If no candidate holds, `TODAY` stays the default.

    Args:
        arm: the choice.
        selected: outcomes of the selection's runs.
        again: outcomes of the confirmation's runs.
    """
    needed = max(level(arm, selected), 2)
    return 0 < level(arm, again) <= needed
