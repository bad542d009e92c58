"""Whether log-probs computed for exact terms are the host's own of the same tokens; knows no host."""

from __future__ import annotations

from torch import Tensor

MEAN_DEVIATION, MEAN_DEVIATION_16_BIT = 1e-3, 0.1
"""Largest mean |difference| that rounding explains, nats."""


def disagreement(ours: Tensor, host: Tensor, mask: Tensor, rounded: bool) -> float | None:
    """The mean |difference| over the tokens of a batch where it is more than rounding, else None.

    Args:
        ours: (B, T) nats.
        host: (B, T) nats.
        mask: (B, T) bool or 0/1; elsewhere both may be anything.
        rounded: the host computed in 16 bits.
    """
    mask = mask.bool()
    difference = (ours.detach().float() - host.detach().float()).abs().masked_fill(~mask, 0.0)
    mean = float(difference.sum() / mask.sum().clamp(min=1))
    return None if mean <= (MEAN_DEVIATION_16_BIT if rounded else MEAN_DEVIATION) else mean
