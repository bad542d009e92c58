"""95 % intervals of a mean of few measurements, and of a share from counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev

# Student's t at 97.5 % by degrees of freedom. Beyond the table the last entry is used, which gives a wider interval.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def student(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean by Student's t.

    Args:
        values: two or more independent measurements.

    Returns:
        The lower and the upper end.
    """
    middle, half = mean(values), _T[min(len(values) - 1, len(_T)) - 1] * stdev(values) / math.sqrt(len(values))
    return middle - half, middle + half


_Z = 1.959964  # quantile of the standard normal distribution at 97.5 %


def wilson(count: int, of: int) -> tuple[float, float]:
    """Return the 95 % interval of a share by Wilson's score, which is within 0 and 1 also for a share of 0 or 1.

    Args:
        count: number of cases that were counted.
        of: number of all cases, at least one.

    Returns:
        The lower and the upper end.
    """
    share, size = count / of, 1 + _Z**2 / of
    middle = (share + _Z**2 / (2 * of)) / size
    half = _Z * math.sqrt(share * (1 - share) / of + _Z**2 / (4 * of**2)) / size
    # For a share of 0 or 1 one end is exact; computing it would give 1e-16 by rounding.
    return (0.0 if count == 0 else middle - half), (1.0 if count == of else middle + half)
