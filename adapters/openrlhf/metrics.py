"""The ``kl/`` metrics in OpenRLHF's own status: means weighted by tokens, maxima as maxima, one scalar per key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kl_plugins.metrics import REDUCTIONS

UNWEIGHTED = ("kl/active", "kl/beta")
"""Keys that a micro-batch without tokens has as well."""


class Accumulator:
    """Sums and maxima over micro-batches; nothing leaves the device before :meth:`reduced`."""

    def __init__(self) -> None:
        """Start with nothing."""
        self._sums: dict[str, Tensor] = {}
        self._largest: dict[str, Tensor] = {}

    def add(self, found: Mapping[str, Tensor], mask: Tensor, beta: float) -> None:
        """Add one micro-batch.

        Args:
            found: 0-d tensors by key, the same keys on every rank.
            mask: (B, T) response tokens.
            beta: the coefficient in use.
        """
        tokens = mask.sum().double()
        one = torch.ones_like(tokens)
        for key, value in {**found, "kl/beta": one * beta}.items():
            value = value.double()
            if REDUCTIONS.get(key) == "max":
                self._largest[key] = torch.maximum(self._largest.get(key, value), value)
            else:
                self._add(key, value if key in UNWEIGHTED else value * tokens)
        self._add("tokens", tokens)
        self._add("batches", one)

    def _add(self, key: str, value: Tensor) -> None:
        self._sums[key] = self._sums[key] + value if key in self._sums else value

    def reduced(self, group: Any = None, distributed: bool = False) -> dict[str, float]:
        """The metrics of everything that was added, on all ranks; empties the accumulator.

        Args:
            group: process group of the ranks, None = all.
            distributed: whether there are other ranks; every one has to call it.

        Returns:
            Numbers by key; nothing where nothing was added.
        """
        sums, largest, self._sums, self._largest = self._sums, self._largest, {}, {}
        if not sums:
            return {}
        total, top = torch.stack(list(sums.values())), torch.stack(list(largest.values()))
        if distributed:
            torch.distributed.all_reduce(total, group=group)
            torch.distributed.all_reduce(top, op=torch.distributed.ReduceOp.MAX, group=group)
        found = dict(zip(sums, total.tolist(), strict=True))
        tokens, batches = max(found.pop("tokens"), 1.0), found.pop("batches")
        means = {key: value / (batches if key in UNWEIGHTED else tokens) for key, value in found.items()}
        return {**means, **dict(zip(largest, top.tolist(), strict=True))}
