"""Blocks of steps in turns; time and peak memory of each, and what they say together."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.overhead.plan import AGAIN, ARMS, HOST, SPEC


@dataclass(frozen=True)
class Block:
    """Some steps of one arm.

    Attributes:
        seconds: of each timed step.
        peak: largest memory of the training process during them, bytes.
        base: its memory before them.
    """

    seconds: list[float]
    peak: int
    base: int


def in_turns(run: Callable[[str], Block], rounds: int) -> dict[str, list[Block]]:
    """Every arm once per round; each round starts with another, so that no arm always follows the same one.

    Args:
        run: one block of an arm.
        rounds: how often.
    """
    found: dict[str, list[Block]] = {arm: [] for arm in ARMS}
    for index in range(rounds):
        shift = index % len(ARMS)
        for arm in (*ARMS[shift:], *ARMS[:shift]):
            found[arm].append(run(arm))
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "lower": lower, "upper": upper}


def summary(blocks: dict[str, list[Block]]) -> dict[str, Any]:
    """What the blocks of one pair say; ratios are taken within a round, so that a slower machine falls out.

    Returns:
        Per arm the seconds of a step and the peak bytes; ``ratio`` (spec over host) and ``noise`` (host over itself);
        ``memory_ratio`` and ``memory_noise`` of the peaks likewise; ``within_target``: the ratio's median is at most
        1.01; ``decided``: the noise's quartiles lie within a percent, so that the ratio can be told from 1.
    """
    seconds = {arm: [statistics.median(block.seconds) for block in found] for arm, found in blocks.items()}
    peaks = {arm: [float(block.peak) for block in found] for arm, found in blocks.items()}

    def ratio(values: dict[str, list[float]], arm: str) -> dict[str, float]:
        return spread([own / host for own, host in zip(values[arm], values[HOST], strict=True)])

    found: dict[str, Any] = {
        "seconds": {arm: spread(values) for arm, values in seconds.items()},
        "peak_bytes": {arm: spread(values) for arm, values in peaks.items()},
        "ratio": ratio(seconds, SPEC),
        "noise": ratio(seconds, AGAIN),
        "memory_ratio": ratio(peaks, SPEC),
        "memory_noise": ratio(peaks, AGAIN),
    }
    found["within_target"] = found["ratio"]["median"] <= TARGET
    found["decided"] = max(abs(found["noise"][edge] - 1) for edge in ("lower", "upper")) <= TARGET - 1
    return found


TARGET = 1.01
