"""What all ranks have to know together: the numbers of a micro-batch, their log, and the receipts before it all.

A rank that raised alone would leave the others waiting in the host's next collective. So one gather carries everything
that a micro-batch or a rollout has to agree on. Receipts go without a collective, which could hang.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any

import torch
from torch import Tensor

from kl_plugins.adapters.metrics import joined
from kl_plugins.adapters.receipts import timeout
from kl_plugins.adapters.trl.exact import AGREED, Deviation
from kl_plugins.receipts import Receipt, check_receipts

DEFAULT_TIMEOUT = 120.0
"""Seconds that a process waits for the others' receipts; they arrive together, after the host's own model set-up."""

_exchanges = count()

_ALWAYS = "kl/active"
"""A metric that every micro-batch has."""


@dataclass(frozen=True)
class Found:
    """What one rank found in a micro-batch or in a rollout.

    Attributes:
        not_finite: (5,) counts of :func:`kl_plugins.adapters.log_probs.count_not_finite`.
        forbidden_beta: the host's coefficient, where it was changed against the spec's own schedule; else NaN.
        deviation: how far log-probs computed for exact terms are from the host's.
        sums: 0-d tensors to add up over ranks, the same keys on every rank.
        maxima: 0-d tensors of which the largest counts, the same keys on every rank.
    """

    not_finite: Tensor
    forbidden_beta: float = math.nan
    deviation: Deviation = AGREED
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    maxima: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Together:
    """What all ranks found together; equal on every one of them.

    Attributes:
        not_finite: five counts.
        forbidden_betas: what the coefficient was changed to, of the ranks where it was.
        deviation: of each kind the first that is not 0, else 0.
        sums: totals by key.
        maxima: the largest by key.
    """

    not_finite: list[float]
    forbidden_betas: list[float]
    deviation: Deviation
    sums: dict[str, float]
    maxima: dict[str, float]


def together(found: Found, accelerator: Any) -> Together:
    """Exchange what each rank found; one collective, and one transfer from the device.

    Args:
        found: what this rank found.
        accelerator: TRL's accelerator.
    """
    counts = found.not_finite
    dtype = torch.float32 if counts.device.type == "mps" else torch.float64  # MPS has no float64
    own = torch.tensor([found.forbidden_beta, *found.deviation], dtype=dtype, device=counts.device)
    measured = [value.to(counts.device, dtype) for value in (*found.sums.values(), *found.maxima.values())]
    row = torch.cat([counts.to(dtype), own, *(value.reshape(1) for value in measured)])
    rows: list[list[float]] = accelerator.gather(row.unsqueeze(0)).tolist()
    columns = [list(column) for column in zip(*rows, strict=True)]
    first = counts.numel()
    betas, *deviations = columns[first : first + len(own)]
    rest = columns[first + len(own) :]
    sums, maxima = rest[: len(found.sums)], rest[len(found.sums) :]
    return Together(
        not_finite=[sum(column) for column in columns[:first]],
        forbidden_betas=[beta for beta in betas if not math.isnan(beta)],
        deviation=Deviation(*(next((value for value in column if value != 0), 0.0) for column in deviations)),
        sums={key: sum(column) for key, column in zip(found.sums, sums, strict=True)},
        maxima={key: max(column) for key, column in zip(found.maxima, maxima, strict=True)},
    )


class Window:
    """What has been added up since TRL last logged, over micro-batches and ranks.

    TRL averages each list of its log when it logs, and empties the log afterwards. So each list holds one number, that
    of the whole window, and a log without it means that a new window has begun.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self._sums: dict[str, float] = {}
        self._maxima: dict[str, float] = {}

    def add(
        self, log: MutableMapping[str, list[float]], sums: Mapping[str, float], maxima: Mapping[str, float]
    ) -> dict[str, float]:
        """Add a micro-batch and put the window's metrics into TRL's log.

        Args:
            log: TRL's ``_metrics[mode]``.
            sums: totals over all ranks, see :func:`kl_plugins.adapters.metrics.sums_and_maxima`.
            maxima: the largest of all ranks.

        Returns:
            The metrics of the window before this one where a new one begins; else nothing.
        """
        ended: dict[str, float] = {}
        if not log.get(_ALWAYS) and self._sums:
            ended = joined(self._sums, self._maxima)
            self._sums, self._maxima = {}, {}
        for key, value in sums.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
        for key, value in maxima.items():
            self._maxima[key] = max(self._maxima.get(key, value), value)
        for key, value in joined(self._sums, self._maxima).items():
            log[key] = [value]
        return ended


def exchange(receipt: Receipt) -> list[Receipt]:
    """Exchange the receipts of all processes, and check them.

    A process without the hooks gives none and would not take part in a collective, which would then hang. So receipts
    go through the key-value store of ``torch.distributed``, where waiting has an end.

    Args:
        receipt: this process's own.

    Returns:
        Every process's receipt, by rank.

    Raises:
        MissingReceiptError: a rank gave none in time, or runs something else.
    """
    receipts = _through_store(receipt) if receipt.world_size > 1 else [receipt]
    check_receipts(receipts, receipt.world_size)
    return receipts


def _through_store(receipt: Receipt) -> list[Receipt]:
    import torch.distributed as dist

    if not dist.is_initialized():
        # Without a process group there is no store (TPU); the launcher's own collective is all there is.
        from accelerate.utils import gather_object

        return [Receipt.from_dict(data) for data in gather_object([receipt.to_dict()])]
    store = dist.distributed_c10d._get_default_store()
    prefix = f"kl_plugins/receipt/{next(_exchanges)}"
    store.set(f"{prefix}/{receipt.rank}", json.dumps(receipt.to_dict()))
    limit = timeout(DEFAULT_TIMEOUT)
    found = []
    for rank in range(receipt.world_size):
        key = f"{prefix}/{rank}"
        try:
            # One rank uses up the whole limit; the rest have had that long to arrive.
            store.wait([key], timedelta(seconds=limit))
        except (RuntimeError, TimeoutError):  # DistStoreError, or what older stores raise
            limit = 0.1
            continue
        found.append(Receipt.from_dict(json.loads(store.get(key))))
    return found
