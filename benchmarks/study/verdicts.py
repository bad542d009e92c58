"""The judgement of a claim: an effect per seed, its interval over seeds, and a comparison with a threshold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, Literal

from benchmarks.intervals import student

Direction = Literal["above", "below", "within"]
REPRODUCED, REFUTED, UNDECIDED = "reproduced", "not reproduced", "undecided"


@dataclass(frozen=True)
class Point:
    """One kind of run in a claim's effect: a `settings.Cell` without task, family and host."""

    arm: str
    delay: int = 0
    precision: str = "fp32"


@dataclass(frozen=True)
class Claim:
    """A published statement and the test that decides it, which was fixed before any run.

    The effect of a seed is the sum of the measure over `plus` minus the sum over `minus`. If `log` is set, logarithms
    of the measure are used, so that the effect is the log of a ratio.

    Attributes:
        name: short name.
        source: publication; `control` for a test that must hold, because the other tests have no meaning without it.
        says: the statement.
        tasks: tasks on which it is tested.
        measure: a key of `measures`.
        plus, minus: runs with equal seeds.
        direction: direction of the effect: `above` or `below` the threshold, or `within` it on either side of 0.
        threshold: threshold in the effect's units.
        log: whether the logarithm of the measure is used.
    """

    name: str
    source: str
    says: str
    tasks: tuple[str, ...]
    measure: str
    plus: tuple[Point, ...]
    minus: tuple[Point, ...]
    direction: Direction
    threshold: float
    log: bool = False

    @property
    def rule(self) -> str:
        """Return the test in words."""
        measure = f"log {self.measure}" if self.log else self.measure
        limit = f"{self.threshold:+.3f}" if self.direction != "within" else f"\u00b1{self.threshold:.3f}"
        if self.log:
            ratio = math.exp(self.threshold)
            limit += f" (a ratio of {ratio:.2f})" if self.direction != "within" else f" (a ratio within {ratio:.2f})"
        sides = " \u2212 ".join(filter(None, (_sum(self.plus), _sum(self.minus))))
        return f"{measure}: {sides}; 95 % interval {self.direction} {limit}"

    def effect(self, measured: Mapping[Point, Mapping[str, float]]) -> float:
        """Return the effect in one seed, from each point's measures."""
        read: Callable[[float], float] = (lambda x: math.log(max(x, 1e-12))) if self.log else float
        value = [read(measured[p][self.measure]) for p in self.plus]
        return sum(value) - sum(read(measured[p][self.measure]) for p in self.minus)


@dataclass(frozen=True)
class Verdict:
    """The result of a claim's test on one task with one model family.

    Attributes:
        verdict: reproduced, not reproduced, or undecided.
        effects: effects, one per seed.
        effect: mean of the effects.
        low, high: 95 % interval of the mean by Student's t; None with fewer than two seeds.
    """

    verdict: str
    effects: tuple[float, ...]
    effect: float
    low: float | None
    high: float | None


def judge(claim: Claim, effects: Sequence[float]) -> Verdict:
    """Apply a claim's test to its effects over seeds.

    With fewer than two effects, or with an effect that is not finite, the verdict is undecided.
    """
    if not effects:
        return Verdict(UNDECIDED, (), math.nan, None, None)
    middle = mean(effects)
    if len(effects) < 2 or not all(map(math.isfinite, effects)):
        return Verdict(UNDECIDED, tuple(effects), middle, None, None)
    low, high = student(effects)
    holds, fails = _against(claim, low, high)
    verdict = REPRODUCED if holds else REFUTED if fails else UNDECIDED
    return Verdict(verdict, tuple(effects), middle, low, high)


def interval(row: Mapping[str, Any]) -> str:
    """Return a judged claim's effect and interval as text. Effects on logarithms are shown as ratios."""
    if row["effect"] is None:
        return "-"
    show = (lambda x: f"\u00d7{math.exp(min(x, 700)):.3g}") if row["log"] else (lambda x: f"{x:+.3f}")
    if row["low"] is None:
        return show(row["effect"])
    return f"{show(row['effect'])} [{show(row['low'])}, {show(row['high'])}]"


def _against(claim: Claim, low: float, high: float) -> tuple[bool, bool]:
    if claim.direction == "above":
        return low > claim.threshold, high < claim.threshold
    if claim.direction == "below":
        return high < claim.threshold, low > claim.threshold
    return -claim.threshold < low and high < claim.threshold, low > claim.threshold or high < -claim.threshold


def measures(record: Mapping[str, Any], beta: float) -> dict[str, float]:
    """Return the measures that claims use, from one run's curve.

    Returns:
        At the end of the run: `reward` (rewarded share), `kl` and `entropy` (nats per completion), `objective` (reward
        minus beta KL). Over the second half of the curve: `kl roughness` and `reward roughness`, the standard
        deviations of the second differences of log KL and of the reward, which are 0 for a steady trend.
    """
    curve = record["curve"]
    end = curve[-1]
    late = curve[len(curve) // 2 :]
    return {
        "reward": end["reward"],
        "kl": end["kl"],
        "entropy": end["entropy"],
        "objective": end["reward"] - beta * end["kl"],
        "kl roughness": _roughness([math.log(max(p["kl"], 1e-12)) for p in late]),
        "reward roughness": _roughness([p["reward"] for p in late]),
    }


def _roughness(values: Sequence[float]) -> float:
    second = [a - 2 * b + c for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    return math.sqrt(mean(d * d for d in second)) if second else math.nan


def _sum(points: tuple[Point, ...]) -> str:
    names = []
    for p in points:
        extra = [f"delay {p.delay}"] * bool(p.delay) + [p.precision] * (p.precision != "fp32")
        names.append(p.arm.replace("/allow:biased", "") + (f" ({', '.join(extra)})" if extra else ""))
    return f"[{' + '.join(names)}]" if len(names) > 1 else "".join(names)
