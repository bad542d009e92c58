"""The ``kl/`` metrics through veRL's own tracking, weighted by tokens over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from kl_plugins.metrics import REDUCTIONS

TOKENS = "kl/tokens"
"""Carries the weights of the means from the workers to the trainer, which takes it out again."""

UNWEIGHTED = ("kl/active", "kl/beta")
"""Keys that a micro-batch without tokens has as well."""


def worker_metrics(
    found: Mapping[str, Tensor], tokens: float, beta: float, make: Callable[[str, float], Any]
) -> dict[str, Any]:
    """One micro-batch's metrics in a form that veRL may add up: means as sums over tokens.

    Args:
        found: 0-d tensors by key, the same keys on every rank.
        tokens: response tokens of the micro-batch.
        beta: the coefficient in use.
        make: builds veRL's metric object from an aggregation (``sum``, ``max``, ``mean``) and a value.
    """
    columns = torch.stack([value.double() for value in found.values()]).tolist()  # one transfer from the device
    made: dict[str, Any] = {TOKENS: make("sum", tokens), "kl/beta": make("mean", beta)}
    for key, value in zip(found, columns, strict=True):
        if key in UNWEIGHTED:
            made[key] = make("mean", value)
        elif REDUCTIONS[key] == "max":
            made[key] = make("max", value)
        else:
            made[key] = make("sum", value * tokens)
    return made


def finish(metrics: MutableMapping[str, Any], prefix: str) -> bool:
    """Turn the sums into means and strip veRL's prefix, in place; values may be numbers or lists over mini-batches.

    Args:
        metrics: what veRL's trainer got from its workers.
        prefix: what veRL put before worker metrics.

    Returns:
        Whether any KL metrics were there.
    """
    ours = {key: metrics.pop(key) for key in list(metrics) if key.startswith(f"{prefix}kl/")}
    found = {key.removeprefix(prefix): _total(value, "max" in key) for key, value in ours.items()}
    if not found:
        return False
    tokens = found.pop(TOKENS)
    for key, value in found.items():
        weighted = key not in UNWEIGHTED and REDUCTIONS[key] == "mean"
        metrics[key] = value / max(tokens, 1e-8) if weighted else value
    return True


def _total(value: Any, largest: bool) -> float:
    # Means over mini-batches keep the ratio of a sum to its tokens.
    if not isinstance(value, list):
        return float(value)
    return float(max(value)) if largest else float(sum(value)) / len(value)
