"""What draws of the reference add to the KL over set and bucket of :mod:`bucket`.

Set and bucket leave out the KL inside the bucket, sum p_a (u_a - L) over the tokens a outside the set. Its gradient is
sum p_a (u_a - L) grad log p_a. One term of it is known from the label y, which was drawn from p. Here the reference has
drawn m more tokens b from its tail, each with a known probability r_b. Both kinds of samples are combined by the
balance heuristic (Veach and Guibas, 1995). A token that one kind rarely gives is left to the other kind:

    label:      p_y / (p_y + m r_y)  (u_y - L) grad log p_y,
    each draw:  p_b / (p_b + m r_b)  (u_b - L) grad log p_b.

The expectation of the label's part is the sum over a of p_a times its coefficient, and that of the m draws the sum of
m r_a times theirs. Together they are the gradient above, for any r. No coefficient is larger than |u - L|. Only the
label's part needs an importance weight if another policy drew it, and this part is small where m r is larger than p.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kl_plugins.kernels.exact.reference import RefDraws
from kl_plugins.numerics import LINEAR_LIMIT


class WeightedSum(torch.autograd.Function):
    """(log_probs (N, m), coefficients (N, m)) -> sum of the coefficients (N,); their gradient is that of a constant."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, coefficients: Tensor) -> Tensor:
        """Add up the coefficients."""
        ctx.save_for_backward(coefficients)
        return coefficients.sum(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Multiply the coefficients by the upstream gradient."""
        (coefficients,) = ctx.saved_tensors
        return grads[0][:, None] * coefficients, None


weighted_sum: Callable[[Tensor, Tensor], Tensor] = WeightedSum.apply
"""Apply :class:`WeightedSum`."""


def label_share(logp: Tensor, log_rate: Tensor, kept: Tensor) -> Tensor:
    """Return p / (p + m r) of the labels, (N,), detached.

    Args:
        logp: (N,) log-probs of the labels under the policy, nats.
        log_rate: (N,) log(m r) of the labels.
        kept: (N,) bool; other rows get 0.
    """
    share = torch.sigmoid(logp.detach().double() - log_rate.double())
    return torch.where(kept, share, 0.0).to(logp.dtype)


def drawn_part(log_probs: Tensor, draws: RefDraws, level: Tensor, kept: Tensor) -> Tensor:
    """Return what the draws add to the KL.

    Args:
        log_probs: (N, m) log-probs of the draws under the policy, nats, with their graph.
        draws: the draws of each row.
        level: (N,) L, nats.
        kept: (N,) bool; other rows get 0.

    Returns:
        (N,) nats, with its graph, of any sign.
    """
    with torch.no_grad():
        ours = log_probs.double().clamp_max(0.0)
        inside = (ours - draws.logp.double() - level.double()[:, None]).clamp(-LINEAR_LIMIT, LINEAR_LIMIT)
        share = torch.sigmoid(ours - draws.log_rate.double())
        unused = (share == 0) | ~kept[:, None]  # also where the policy has no mass, so that 0 times NaN does not occur
        coefficients = (share * inside).masked_fill(unused, 0.0).to(log_probs.dtype)
    return weighted_sum(log_probs, coefficients)


def with_draws(
    kl: Tensor, remainder: Tensor, level: Tensor, log_probs: Tensor, logp: Tensor, kept: Tensor, draws: RefDraws
) -> tuple[Tensor, Tensor]:
    """Combine the KL of set and bucket and the label's remainder with the draws.

    Args:
        kl: (N,) KL of set and bucket, nats, with its graph.
        remainder: (N,) u - L of the label, nats.
        level: (N,) L, nats.
        log_probs: (N, m) log-probs of the draws under the policy, nats, with their graph.
        logp: (N,) log-probs of the labels under the policy, nats.
        kept: (N,) bool; other rows get 0.
        draws: the draws of each row.

    Returns:
        (N,) the KL with what the draws add; and (N,) the remainder times the label's share.
    """
    share = label_share(logp, draws.label_log_rate, kept)
    return kl + drawn_part(log_probs, draws, level, kept), remainder * share
