"""The ``kl/`` metrics in veRL: workers send sums and maxima, and the trainer turns them into metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from kl_plugins.adapters.metrics import TOKENS, joined, sums_and_maxima

SUM, MAX = "kl_plugins/sum/", "kl_plugins/max/"
"""Prefixes of the keys on the way.

veRL joins mini-batches by names: the largest where a key contains "max", else the mean. A mean of sums is as good as
their total, because only ratios of sums are reported.
"""


def worker_metrics(
    found: Mapping[str, Tensor], mask: Tensor, beta: float, make: Callable[[str, float], Any]
) -> dict[str, Any]:
    """Return one micro-batch's sums and maxima in the form in which veRL carries them.

    Args:
        found: 0-d tensors by key, the same keys on every rank.
        mask: (B, T), True on response tokens.
        beta: the coefficient that was applied.
        make: builds veRL's metric object from an aggregation (``sum`` or ``max``) and a value.
    """
    sums, maxima = sums_and_maxima(found, mask, beta)
    numbers = iter(torch.stack([*sums.values(), *maxima.values()]).tolist())  # one transfer from the device
    return {
        f"{prefix}{key}": make(how, next(numbers))
        for prefix, how, part in ((SUM, "sum", sums), (MAX, "max", maxima))
        for key in part
    }


def finish(metrics: MutableMapping[str, Any], prefix: str) -> bool:
    """Turn sums and maxima into the ``kl/`` metrics, in place; values may be numbers or lists over mini-batches.

    Args:
        metrics: what veRL's trainer got from its workers.
        prefix: what veRL put before worker metrics.

    Returns:
        Whether any KL metrics were there.
    """
    sums = {key: _sum(value) for key, value in _taken(metrics, f"{prefix}{SUM}").items()}
    maxima = {key: _largest(value) for key, value in _taken(metrics, f"{prefix}{MAX}").items()}
    if not sums:
        return False
    # veRL has divided the totals by the numbers of ranks and mini-batches, so that less than one token may be left.
    scale = 1 / sums[TOKENS] if 0 < sums[TOKENS] < 1 else 1.0
    metrics.update(joined({key: value * scale for key, value in sums.items()}, maxima))
    return True


def _taken(metrics: MutableMapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): metrics.pop(key) for key in list(metrics) if key.startswith(prefix)}


def _sum(value: Any) -> float:
    value = _joined(value)
    return float(sum(value)) if isinstance(value, list) else float(value)


def _largest(value: Any) -> float:
    value = _joined(value)
    return float(max(value)) if isinstance(value, list) else float(value)


def _joined(value: Any) -> Any:
    """Turn veRL's metric object into numbers, if it is still one; it knows how its values join."""
    return value.aggregate() if hasattr(value, "aggregate") else value
