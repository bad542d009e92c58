"""One metric over the steps of a run, and the functions by which rules and plots look at it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Series:
    """Logged values of one metric.

    Attributes:
        steps: the steps, in rising order.
        values: one value per step; NaN and infinity are kept.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.steps)

    def finite(self) -> Series:
        """Return the part of the series whose values are finite."""
        kept = [(step, value) for step, value in zip(self.steps, self.values, strict=True) if math.isfinite(value)]
        return Series(tuple(step for step, _ in kept), tuple(value for _, value in kept))

    def last(self) -> tuple[int, float] | None:
        """Return the last step and its value, or None if there is none."""
        return (self.steps[-1], self.values[-1]) if self.steps else None


def series_of(points: dict[int, float]) -> Series:
    """Return a series from values by step, in any order."""
    steps = sorted(points)
    return Series(tuple(steps), tuple(points[step] for step in steps))


def median(values: Sequence[float]) -> float:
    """Return the median of at least one finite value."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the running median over a twentieth of all values, and over at least 3.

    A median, and not a mean, because one token with a large ratio can make a spike in one step. At both ends the window
    is moved and not cut, so that every median is over equally many values.
    """
    width = min(2 * max(len(values) // 40, 1) + 1, len(values))
    starts = (min(max(i - width // 2, 0), len(values) - width) for i in range(len(values)))
    return [median(values[start : start + width]) for start in starts]


def thinned(series: Series, most: int) -> Series:
    """Return at most ``most`` points for a plot: the smallest and the largest value of each part of the run.

    A spike in a single step is never lost. A value that is not finite takes the place of one of the two.

    Args:
        series: any series.
        most: the number of points, at least 2.
    """
    if len(series) <= most:
        return series
    parts = most // 2
    kept: set[int] = set()
    for part in range(parts):
        indices = range(part * len(series) // parts, (part + 1) * len(series) // parts)
        ranked = sorted(indices, key=lambda i: _order(series.values[i]))
        kept.update((ranked[0], ranked[-1]))
    chosen = sorted(kept)
    return Series(tuple(series.steps[i] for i in chosen), tuple(series.values[i] for i in chosen))


def _order(value: float) -> float:
    return math.inf if math.isnan(value) else value
