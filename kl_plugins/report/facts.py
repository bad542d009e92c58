"""Facts about one series: pure functions of a series and a limit, which return what they saw or None.

A condition *lasts* from a step on if it holds there and in nine of ten logged steps from there to the end of the log.
If it does not last, it is reported if it held in one of ten logged steps, and in more than one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from kl_plugins.report.series import Series, median, smoothed

LASTING = 0.9
"""Share of the steps after the first one in which a lasting condition holds."""

OFTEN = 0.1
"""Share of all logged steps in which a condition that does not last has to hold."""

FEWEST = 3
"""Least number of steps of a lasting condition, if the log has as many."""


@dataclass(frozen=True)
class Fact:
    """What a function saw in a series.

    Attributes:
        first: first step at which the condition holds.
        last: last step at which it holds.
        count: number of logged steps at which it holds.
        total: number of logged steps.
        value: typical value where it holds; for a change, the value after it; for spikes, the largest one.
        before: for a change, the value before it; for spikes, the usual value; otherwise NaN.
        lasting: whether it holds from ``first`` to the end of the log.
        always: whether it holds from the first logged step to the end of the log.
    """

    first: int
    last: int
    count: int
    total: int
    value: float
    before: float = math.nan
    lasting: bool = False
    always: bool = False

    def when(self) -> str:
        """Return the beginning of a sentence that says at which steps the condition holds."""
        if self.count == self.total:
            return "In every logged step" if self.total > 1 else f"In step {self.first}"
        if self.always:
            return "From the first logged step on"
        if self.lasting:
            return f"From step {self.first} on"
        if self.count == 1:
            return f"In step {self.first}"
        return f"In {self.count} of {self.total} logged steps, between step {self.first} and step {self.last}"


def not_finite(series: Series, limit: float = 0.0) -> Fact | None:
    """See values that are NaN or infinite; ``limit`` is not used."""
    return _all([not math.isfinite(value) for value in series.values], series)


def ever_below(series: Series, limit: float) -> Fact | None:
    """See any value below ``limit``."""
    series = series.finite()
    return _all([value < limit for value in series.values], series)


def ever_at_least(series: Series, limit: float) -> Fact | None:
    """See any value of at least ``limit``."""
    series = series.finite()
    return _all([value >= limit for value in series.values], series)


def above(series: Series, limit: float) -> Fact | None:
    """See values above ``limit`` that last or are frequent."""
    series = series.finite()
    return _lasting_or_often([value > limit for value in series.values], series)


def below(series: Series, limit: float) -> Fact | None:
    """See values below ``limit`` that last or are frequent."""
    series = series.finite()
    return _lasting_or_often([value < limit for value in series.values], series)


def zeros(series: Series, limit: float = 0.0) -> Fact | None:
    """See values of 0 that last or are frequent; ``limit`` is not used."""
    series = series.finite()
    return _lasting_or_often([value == 0 for value in series.values], series)


def off_one(series: Series, limit: float) -> Fact | None:
    """See values that differ from 1 by more than ``limit``, if that lasts or is frequent."""
    series = series.finite()
    return _lasting_or_often([abs(value - 1) > limit for value in series.values], series)


def off_at_start(series: Series, limit: float) -> Fact | None:
    """See an absolute value above ``limit`` in the first step, if the log begins with step 0 or 1."""
    series = series.finite()
    if not series.steps or series.steps[0] > 1 or abs(series.values[0]) <= limit:
        return None
    return Fact(series.steps[0], series.steps[0], 1, len(series), series.values[0])


def always_zero(series: Series, limit: float = 0.0) -> Fact | None:
    """See a series of at least three values that are all 0; ``limit`` is not used."""
    if len(series) < FEWEST or any(value != 0 for value in series.values):
        return None
    return Fact(series.steps[0], series.steps[-1], len(series), len(series), 0.0, lasting=True, always=True)


def rising(series: Series, limit: float) -> Fact | None:
    """See a value that rises to ``limit`` times its early level and has not come down at the end.

    The early level is the median of the first half of the log. ``first`` is the last step at which the running median
    was at most a quarter above it, and ``value`` is the median of the last tenth. A series that rises at first and then
    levels off is not seen, because its early level is near its last one.

    Args:
        series: at least ten finite values; fewer show nothing.
        limit: the factor.
    """
    series = series.finite()
    if len(series) < 10:
        return None
    smooth = smoothed(series.values)
    level = median(smooth[: len(smooth) // 2])
    end = median(smooth[-max(len(smooth) // 10, 1) :])
    if level <= 0 or end < limit * level:
        return None
    onset = max(i for i, value in enumerate(smooth) if value <= 1.25 * level)
    count = len(series) - 1 - onset
    return Fact(series.steps[onset], series.steps[-1], count, len(series), end, level, lasting=True)


def spikes(series: Series, limit: float) -> Fact | None:
    """See values above ``limit`` times the median of the log, in at most a tenth of all steps.

    Args:
        series: at least ten finite values; fewer show nothing.
        limit: the factor.
    """
    series = series.finite()
    if len(series) < 10 or (middle := median(series.values)) <= 0:
        return None
    fact = _all([value > limit * middle for value in series.values], series)
    if fact is None or fact.count > OFTEN * fact.total:
        return None
    return replace(fact, value=max(series.values), before=middle)


def fallen(series: Series, limit: float) -> Fact | None:
    """See a value that has lost more than the share ``limit`` of what it had gained since the start of the log.

    ``before`` is the best running median, ``value`` the median of the last tenth. The loss has to be more than twice
    the median distance between one value and the next, which is the noise.

    Args:
        series: at least ten finite values; fewer show nothing.
        limit: the share, between 0 and 1.
    """
    series = series.finite()
    if len(series) < 10:
        return None
    smooth = smoothed(series.values)
    end, best = median(smooth[-max(len(smooth) // 10, 1) :]), max(smooth)
    peak = smooth.index(best)
    noise = median([abs(after - before) for before, after in pairwise(series.values)])
    gained, lost = best - median(smooth[: max(len(smooth) // 10, 1)]), best - end
    if lost <= max(limit * gained, 2 * noise):
        return None
    return Fact(series.steps[peak], series.steps[-1], len(series) - peak, len(series), end, best, lasting=True)


def stuck(series: Series, limit: float) -> Fact | None:
    """See a value that has moved and then stays at its largest or smallest value to the end.

    Args:
        series: at least ten finite values; fewer show nothing.
        limit: the least share of all logged steps that it has stayed there.
    """
    series = series.finite()
    if len(series) < 10 or len(set(series.values)) < FEWEST:
        return None
    end = series.values[-1]
    if end not in (max(series.values), min(series.values)):
        return None
    onset = len(series) - 1
    while series.values[onset - 1] == end:
        onset -= 1
    count = len(series) - onset
    if count < max(FEWEST, limit * len(series)):
        return None
    return Fact(series.steps[onset], series.steps[-1], count, len(series), end, lasting=True)


def _all(flags: Sequence[bool], series: Series) -> Fact | None:
    """Return the fact that ``flags`` hold at any step."""
    held = [i for i, flag in enumerate(flags) if flag]
    if not held:
        return None
    values = [series.values[i] for i in held]
    typical = median(values) if all(map(math.isfinite, values)) else values[0]
    return Fact(series.steps[held[0]], series.steps[held[-1]], len(held), len(series), typical)


def _lasting_or_often(flags: Sequence[bool], series: Series) -> Fact | None:
    total = len(flags)
    count, onset, inside = 0, None, 0
    for i in range(total - 1, -1, -1):
        count += flags[i]
        enough = count >= LASTING * (total - i) and total - i >= min(FEWEST, total)
        if flags[i] and enough and flags[-1]:
            onset, inside = i, count
    if onset is not None:
        typical = median([series.values[i] for i in range(onset, total) if flags[i]])
        first, last = series.steps[onset], series.steps[-1]
        return Fact(first, last, inside, total, typical, lasting=True, always=onset == 0)
    return _all(flags, series) if sum(flags) >= max(OFTEN * total, 2) else None
