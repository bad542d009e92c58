"""Joins the ``kl/`` metrics of micro-batches and ranks into those of one large batch.

Means over tokens are joined by their sums, and maxima by their maximum. A standard deviation and an effective sample
size are not sums: they are turned into the sums from which they are computed, and computed again from the joined sums.

This module also logs a line if a floor raised most of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kl_plugins.kernels.backend import say_once
from kl_plugins.metric_names import PROBE_SUMS
from kl_plugins.metrics import LEAST_KL, REDUCTIONS
from kl_plugins.probe import probe_metrics
from kl_plugins.spec import KLSpec

TOKENS, BATCHES = "tokens", "batches"
"""Keys of the sums that the others are divided by: response tokens, and micro-batches."""

SQUARED_COEFFICIENT, SQUARED_WEIGHT = "coef/square", "weight/square"
"""Keys of the sums that ``kl/coef/std`` and ``kl/ess`` are computed from."""

PER_BATCH = ("kl/active", "kl/beta", "kl/observed")
"""Keys that describe a micro-batch, and not its tokens: a micro-batch without tokens counts as well."""

MANY = 0.5
"""Share of raised weights above which the data are too stale for the correction."""

_LARGEST = 1e100
"""Squares and sums of numbers up to this one stay finite in float64."""


def sums_and_maxima(
    found: Mapping[str, Tensor], mask: Tensor, beta: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what has to be added up, and what has to be maximised, to join one micro-batch with others.

    Nothing is read back from the device.

    Args:
        found: 0-d tensors by key, the same keys on every rank; see :data:`kl_plugins.metrics.REDUCTIONS`. The sums of
            a probe are among them in the steps that have one.
        mask: (B, T), True on response tokens.
        beta: the coefficient that was applied to this micro-batch.

    Returns:
        Two dicts of 0-d tensors, float64 (float32 on devices without it): sums over tokens, and maxima.
    """
    dtype = torch.float32 if mask.device.type == "mps" else torch.float64
    tokens = mask.bool().sum().to(dtype)
    one = torch.ones_like(tokens)
    sums, maxima = {TOKENS: tokens, BATCHES: one, "kl/beta": one * beta}, {}
    values = {key: value.detach().to(dtype) for key, value in found.items()}
    for key, value in values.items():
        if key.startswith(PROBE_SUMS):
            sums[key] = value
            continue
        how = REDUCTIONS.get(key, "mean")
        if how == "max":
            maxima[key] = value
        elif how == "mean":
            sums[key] = value if key in PER_BATCH else value * tokens
    mean, spread = (values[key].clamp(-_LARGEST, _LARGEST) for key in ("kl/coef/mean", "kl/coef/std"))
    sums[SQUARED_COEFFICIENT] = (mean.square() + spread.square()) * tokens
    weight, ess = values["kl/weight/mean"].clamp_max(_LARGEST), values["kl/ess"]
    # ess = mean^2 / mean square; no weight at all gives 0, not 0 / 0.
    sums[SQUARED_WEIGHT] = torch.where(ess > 0, weight.square() / ess.clamp_min(1e-30), 0.0) * tokens
    return sums, maxima


def joined(sums: Mapping[str, float], maxima: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of everything that was added up and maximised.

    Args:
        sums: the totals of :func:`sums_and_maxima` over micro-batches, ranks and the logging window.
        maxima: the largest value of each maximum.

    Returns:
        One number by key: those of :data:`kl_plugins.metrics.REDUCTIONS`, ``kl/beta``, and under ``observe`` those of
        :data:`kl_plugins.metric_names.OBSERVATION`.
    """
    tokens, batches = max(sums[TOKENS], 1.0), max(sums[BATCHES], 1.0)
    found = {
        key: value / (batches if key in PER_BATCH else tokens) for key, value in sums.items() if key.startswith("kl/")
    }
    mean = min(max(found["kl/coef/mean"], -_LARGEST), _LARGEST)
    found["kl/coef/std"] = max(sums[SQUARED_COEFFICIENT] / tokens - mean**2, 0.0) ** 0.5
    square = sums[SQUARED_WEIGHT] / tokens
    weight = min(found["kl/weight/mean"], _LARGEST)
    found["kl/ess"] = min(weight**2 / square, 1.0) if square > 0 else 0.0
    k1, k3 = found["kl/reverse_k1"], found["kl/value"]
    found["kl/disagree"] = abs(k1 - k3) / k3 if k3 >= LEAST_KL else 0.0
    return {**found, **maxima, **probe_metrics(sums)}


def warn_if_floored(spec: KLSpec, found: Mapping[str, float]) -> None:
    """Log one line, once per process, where a spec's floor raised more than :data:`MANY` of the weights.

    With ``floor:1`` every weight below 1 is raised, and half of them are on fresh data from an inexact sampler. So
    that floor is left out.

    Args:
        spec: in use.
        found: the metrics of a whole logging window, from :func:`joined`.
    """
    if spec.floor is not None and spec.floor < 1.0 and found.get("kl/floor_frac", 0.0) > MANY:
        say_once(
            f"kl-plugins: {spec}: over a logging window, the importance weight of more than half of the response "
            "tokens was below the floor (kl/floor_frac > 0.5). For these tokens the gradient is no longer corrected, "
            "because the data come from a policy that is far from the present one. Use fresher data (fewer updates "
            "per rollout), a smaller learning rate, or exact@loss, whose own term needs no weight for its token."
        )


class Accumulator:
    """Adds up the metrics of micro-batches. Nothing is read back from the device before :meth:`total`."""

    def __init__(self) -> None:
        """Start with nothing."""
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, found: Mapping[str, Tensor], mask: Tensor, beta: float) -> None:
        """Add one micro-batch; the arguments are those of :func:`sums_and_maxima`."""
        sums, maxima = sums_and_maxima(found, mask, beta)
        for key, value in sums.items():
            self._sums[key] = self._sums[key] + value if key in self._sums else value
        for key, value in maxima.items():
            self._maxima[key] = torch.maximum(self._maxima[key], value) if key in self._maxima else value

    def packed(self) -> tuple[Tensor, Tensor] | None:
        """Return sums and maxima as two 1-d tensors for collectives, or None if nothing was added."""
        if not self._sums:
            return None
        return torch.stack(list(self._sums.values())), torch.stack(list(self._maxima.values()))

    def total(self, packed: tuple[Tensor, Tensor] | None = None) -> dict[str, float]:
        """Return the metrics of everything that was added, and empty the accumulator.

        Args:
            packed: what :meth:`packed` gave, after it was reduced over ranks; None: this process alone.

        Returns:
            Numbers by key; nothing where nothing was added.
        """
        packed = self.packed() if packed is None else packed
        if packed is None:
            return {}
        sums, maxima = (
            dict(zip(names, part.tolist(), strict=True))
            for names, part in zip((self._sums, self._maxima), packed, strict=True)
        )
        self._sums, self._maxima = {}, {}
        return joined(sums, maxima)
