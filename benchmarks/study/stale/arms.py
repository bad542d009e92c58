"""What is compared, where, with how many seeds. Fixed before the runs; change nothing after seeing any.

Cut from what the study was meant to be, to fit an hour and a half on two cores: the arms that are only reported have
three seeds, and so has the confirmation, which runs five arms alone and skips delay 1.
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
"""What can become the default, by bias, least first. Each equals today's wherever no weight is below its floor. No
weight, the exact term, and a floor with a cap differ from today's elsewhere too, so they are only compared with."""
LOCAL = (UNWEIGHTED, *ELIGIBLE, FLOOR_AND_CAP, EXACT)
"""The reverse KL, each token on its own; a candidate may not fall short of the best of them."""
REPORTED = ("native-bias-corrected", "jeffreys@loss/is:token", "exact@loss/horizon:sequence", "k1@advantage")
DELAYS = (0, 1, 4, 16)
SEEDS, FEWER_SEEDS = 5, 3
FAST = Settings()
SLOW = replace(FAST, learning_rate=5e-4, steps=600)


@dataclass(frozen=True, order=True)
class Place:
    """Where arms are compared.

    Attributes:
        task, family, delay: as in `Cell`.
        rate: the learning rate.
    """

    task: str
    family: str
    delay: int
    rate: float = FAST.learning_rate

    @property
    def fresh(self) -> Place:
        """The same with fresh data."""
        return replace(self, delay=0)

    def cell(self, arm: str) -> Cell:
        """The run of an arm here, but for its seed and settings."""
        return Cell(self.task, self.family, arm, self.delay)

    def __str__(self) -> str:
        rate = "" if self.rate == FAST.learning_rate else f", learning rate {self.rate:g}"
        return f"{self.task}, {self.family}, delay {self.delay}{rate}"


@dataclass(frozen=True)
class Batch:
    """Runs of one setting, seed by seed, so that an interrupted study has whole comparisons."""

    settings: Settings
    places: tuple[Place, ...]
    arms: tuple[str, ...]
    seeds: int


def selection() -> list[Batch]:
    """What the default is chosen by, then what is reported beside it."""
    places = tuple(Place("rare", "qwen2", delay) for delay in DELAYS)
    return [Batch(FAST, places, (NONE, *LOCAL), SEEDS), Batch(FAST, places, REPORTED, FEWER_SEEDS)]


def confirmation(chosen: str) -> list[Batch]:
    """Where the choice has to hold as well.

    The last place of the first batch was never run before in any form: data 8 updates old. Fresh data are there
    because a lost reward is told by them.

    Args:
        chosen: the spec.
    """
    arms = tuple(dict.fromkeys((NONE, UNWEIGHTED, TODAY, chosen, EXACT)))
    tasks = (("common", "qwen2"), ("rare", "llama"))
    fast = [Place(*task, delay) for task in tasks for delay in (0, 4, 16)] + [Place("rare", "qwen2", 8)]
    slow = [Place("rare", "qwen2", delay, SLOW.learning_rate) for delay in (0, 16)]
    return [Batch(FAST, tuple(fast), arms, FEWER_SEEDS), Batch(SLOW, tuple(slow), arms, FEWER_SEEDS)]
