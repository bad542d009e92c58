"""The future-KL term: discounted sums over the tokens that come after each token."""

from __future__ import annotations

import torch
from torch import Tensor


def future_sum(terms: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Compute the discounted sum of the terms after each token: sum_{j>t} gamma^(j-t) terms_j.

    The exponent j - t counts response tokens only.

    See arXiv 2601.10201 (FRPO) and 2506.09477 for why the sequence gradient has this term.

    Args:
        terms: (B, T), 0 outside the mask.
        mask: (B, T) bool, True on response tokens; holes (tool output) are skipped, not counted.
        gamma: discount in [0, 1].

    Returns:
        (B, T), 0 outside the mask.
    """
    to_go = terms.flip(-1).cumsum(-1).flip(-1) if gamma == 1.0 else _discounted_to_go(terms, mask, gamma)
    # The sum is shifted by one token. Subtracting the own term instead would lose digits if that term is huge.
    later = torch.nn.functional.pad(to_go[..., 1:], (0, 1))
    return (gamma * later).masked_fill(~mask, 0.0)


def _discounted_to_go(terms: Tensor, mask: Tensor, gamma: float) -> Tensor:
    # y_t = terms_t + a_t y_{t+1} with a_t = gamma on response tokens and 1 outside the mask: an affine recurrence,
    # composed by doubling in log2(T) steps, without division and without a T x T matrix.
    to_go = terms
    step = torch.ones_like(terms).masked_fill(mask, gamma)  # torch.where would round a float64 gamma to float32
    length, shift = terms.shape[-1], 1
    while shift < length:
        to_go = to_go + step * torch.nn.functional.pad(to_go[..., shift:], (0, shift))
        step = step * torch.nn.functional.pad(step[..., shift:], (0, shift))
        shift *= 2
    return to_go
