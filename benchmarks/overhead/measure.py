"""Blocks of steps, measured in turns: time and peak memory of each block, and their summary."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.intervals import student
from benchmarks.overhead.plan import AGAIN, ARMS, HOST, SPEC


@dataclass(frozen=True)
class Block:
    """Some steps of one arm.

    Attributes:
        seconds: duration of each timed step.
        peak: largest memory of the training process during the steps, bytes.
        base: memory of the training process before the steps, bytes.
    """

    seconds: list[float]
    peak: int
    base: int


def in_turns(run: Callable[[str], Block], rounds: int) -> dict[str, list[Block]]:
    """Run every arm once per round. Each round starts with another arm, so no arm always follows the same arm.

    Args:
        run: runs one block of an arm.
        rounds: number of rounds.
    """
    found: dict[str, list[Block]] = {arm: [] for arm in ARMS}
    for index in range(rounds):
        shift = index % len(ARMS)
        for arm in (*ARMS[shift:], *ARMS[:shift]):
            found[arm].append(run(arm))
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles."""
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "lower": lower, "upper": upper}


def summary(blocks: dict[str, list[Block]], target: float | None) -> dict[str, Any]:
    """Summarise the blocks of one pair. Ratios are taken within a round, so that the speed of the machine cancels.

    Args:
        blocks: blocks by arm.
        target: largest accepted increase of a step's duration, as a share of the duration, or None.

    Returns:
        As medians with quartiles: for each arm the seconds of a step and the peak bytes; ``ratio`` (spec over host) and
        ``noise`` (host over itself); ``memory_ratio`` and ``memory_noise``, the same for the peaks. As means with 95 %
        intervals: ``extra`` and ``extra_seconds``, the relative and absolute time by which a step is longer than the
        mean of the round's two blocks of the host. ``verdict`` compares the interval of ``extra`` with the target.
    """
    seconds = {arm: [statistics.median(block.seconds) for block in found] for arm, found in blocks.items()}
    peaks = {arm: [float(block.peak) for block in found] for arm, found in blocks.items()}

    def ratio(values: dict[str, list[float]], arm: str) -> dict[str, float]:
        return spread([own / host for own, host in zip(values[arm], values[HOST], strict=True)])

    rounds = list(zip(seconds[SPEC], seconds[HOST], seconds[AGAIN], strict=True))
    extra = around_mean([2.0 * spec / (host + again) - 1.0 for spec, host, again in rounds])
    return {
        "seconds": {arm: spread(values) for arm, values in seconds.items()},
        "peak_bytes": {arm: spread(values) for arm, values in peaks.items()},
        "ratio": ratio(seconds, SPEC),
        "noise": ratio(seconds, AGAIN),
        "memory_ratio": ratio(peaks, SPEC),
        "memory_noise": ratio(peaks, AGAIN),
        "extra": extra,
        "extra_seconds": around_mean([spec - (host + again) / 2.0 for spec, host, again in rounds]),
        "verdict": judged(extra, target),
    }


def around_mean(values: Sequence[float]) -> dict[str, float]:
    """Return the mean and its 95 % interval."""
    low, high = student(values)
    return {"mean": statistics.mean(values), "low": low, "high": high}


MET, MISSED, UNDECIDED, NO_TARGET = "met", "missed", "undecided", "no target"


def judged(extra: dict[str, float], target: float | None) -> str:
    """Return whether an increase with this interval meets the target."""
    if target is None:
        return NO_TARGET
    return MET if extra["high"] <= target else MISSED if extra["low"] > target else UNDECIDED
