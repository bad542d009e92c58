"""The plan of the study: its arms, its places and its numbers of seeds.

The plan was fixed before the runs. Nothing in it may change after a run has been seen.

The plan is smaller than first intended, so that it takes an hour and a half on two cores. The arms that are only
reported have three seeds. The confirmation has three seeds as well, runs only five arms, and skips delay 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.study.settings import Cell, Settings

NONE = "none"
UNWEIGHTED = "k2@loss"
TODAY = "k2@loss/is:token"
FLOOR_AND_CAP = "k2@loss/is:token/floor:0.5/cap:2"
EXACT = "exact@loss"
ELIGIBLE = (TODAY, *(f"k2@loss/is:token/floor:{c}" for c in ("0.2", "0.5", "1")))
"""The candidates for the default, in order of bias, with the smallest bias first.

Each candidate equals `TODAY` wherever no weight is below its floor. The term without a weight, the exact term, and the
term with a floor and a cap also differ from `TODAY` elsewhere. They serve only for comparison.
"""
LOCAL = (UNWEIGHTED, *ELIGIBLE, FLOOR_AND_CAP, EXACT)
"""The arms with a token-local reverse KL: each token is given its own KL alone. A candidate is compared with the best
of them and may not fall short of it."""
REPORTED = ("native-bias-corrected", "jeffreys@loss/is:token", "exact@loss/horizon:sequence", "k1@advantage")
TOP_K = ("exact@loss/top:4", "exact@loss/top:4/is:token", "exact@loss/top:4/is:token/floor:0.5")
"""Arms with the reference's 4 most probable of 16 tokens and one bucket. They are run on their own, and their claim in
`rules.top_k_holds` was committed before their first run."""
DELAYS = (0, 1, 4, 16)
SEEDS, FEWER_SEEDS = 5, 3
FAST = Settings()
SLOW = replace(FAST, learning_rate=5e-4, steps=600)


@dataclass(frozen=True, order=True)
class Place:
    """A place where arms are compared: a task, a model family, a delay and a learning rate.

    Attributes:
        task, family, delay: the same as in `Cell`.
        rate: the learning rate.
    """

    task: str
    family: str
    delay: int
    rate: float = FAST.learning_rate

    @property
    def fresh(self) -> Place:
        """Return the same place with fresh data."""
        return replace(self, delay=0)

    def cell(self, arm: str) -> Cell:
        """Return the cell of an arm in this place. The cell has no seed and no settings."""
        return Cell(self.task, self.family, arm, self.delay)

    def __str__(self) -> str:
        rate = "" if self.rate == FAST.learning_rate else f", learning rate {self.rate:g}"
        return f"{self.task}, {self.family}, delay {self.delay}{rate}"


@dataclass(frozen=True)
class Batch:
    """Runs that share their settings.

    They are made seed by seed, so that an interrupted study has whole comparisons.

    Attributes:
        settings: settings of all runs.
        places: places in which every arm is run.
        arms: arms that are compared.
        seeds: number of seeds of every arm in every place.
    """

    settings: Settings
    places: tuple[Place, ...]
    arms: tuple[str, ...]
    seeds: int


def selection() -> list[Batch]:
    """Return the batch by which the default is chosen, then the batch that is only reported."""
    places = tuple(Place("rare", "qwen2", delay) for delay in DELAYS)
    return [Batch(FAST, places, (NONE, *LOCAL), SEEDS), Batch(FAST, places, REPORTED, FEWER_SEEDS)]


def confirmation(chosen: str) -> list[Batch]:
    """Return the batches in which the choice has to hold as well.

    The last place of the first batch has data that are 8 updates old. It had never been run before in any form. The
    batches include fresh data, because a run has lost its reward only in comparison with fresh data.

    Args:
        chosen: the chosen spec.
    """
    arms = tuple(dict.fromkeys((NONE, UNWEIGHTED, TODAY, chosen, EXACT)))
    tasks = (("common", "qwen2"), ("rare", "llama"))
    fast = [Place(*task, delay) for task in tasks for delay in (0, 4, 16)] + [Place("rare", "qwen2", 8)]
    slow = [Place("rare", "qwen2", delay, SLOW.learning_rate) for delay in (0, 16)]
    return [Batch(FAST, tuple(fast), arms, FEWER_SEEDS), Batch(SLOW, tuple(slow), arms, FEWER_SEEDS)]


def top_k() -> Batch:
    """Return the batch of the arms with `top:<k>`, and of the arms that they are compared with."""
    places = tuple(Place("rare", "qwen2", delay) for delay in (0, 4, 16))
    return Batch(FAST, places, (NONE, UNWEIGHTED, EXACT, *TOP_K), FEWER_SEEDS)
