"""The ``kl/`` metrics in TRL's own log, reduced over ranks."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from kl_plugins.metrics import REDUCTIONS


def append(
    log: MutableMapping[str, list[float]], found: Mapping[str, Tensor], mask: Tensor, beta: float, accelerator: Any
) -> None:
    """Reduce one micro-batch's metrics over ranks and append them to the host's log.

    Means are weighted by each rank's tokens. Every rank has to call it: it holds one collective.

    Args:
        log: TRL's ``_metrics[mode]``.
        found: 0-d tensors by key, the same keys on every rank.
        mask: (B, T) bool.
        beta: the coefficient in use.
        accelerator: TRL's accelerator.
    """
    keys = sorted(found)
    local = torch.stack([mask.sum().float(), *(found[key].float() for key in keys)]).unsqueeze(0)
    tokens, *columns = accelerator.gather(local).unbind(dim=1)
    share = tokens / tokens.sum().clamp_min(1.0)
    for key, column in zip(keys, columns, strict=True):
        value = column.max() if REDUCTIONS[key] == "max" else (share * column).sum()
        # A rank without tokens is active all the same.
        log[key].append(1.0 if key == "kl/active" else value.item())
    log["kl/beta"].append(beta)
