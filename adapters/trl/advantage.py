"""``@advantage``: the penalty after normalisation, token by token."""

from __future__ import annotations

from typing import Any

from torch import Tensor

DETACHED_RATIO = ("cispo", "vespo")
"""Loss types of GRPO in which the importance ratio carries no gradient: the log-prob of each token carries its own."""


def by_sequence(config: Any) -> bool:
    """Whether GRPO multiplies one live importance ratio per sequence with the advantages.

    Per-token advantages would then act on the ratio, that is, on the mean log-prob of the whole sequence.

    Args:
        config: a GRPOConfig.
    """
    return config.importance_sampling_level == "sequence" and config.loss_type not in DETACHED_RATIO


def per_token(advantages: Tensor, penalty: Tensor, beta: float) -> Tensor:
    """Per-token advantages minus beta times the penalty, for a host that takes (B, T).

    See arXiv 2601.10201.

    Args:
        advantages: (B,) or (B, T), normalised.
        penalty: (B, T), nats per unit beta.
        beta: coefficient.

    Returns:
        (B, T).
    """
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)
    return advantages - beta * penalty.to(advantages)


def per_sequence(advantages: Tensor, penalty: Tensor, logp: Tensor, mask: Tensor, *, averaged: bool = False) -> Tensor:
    """The same for a host that multiplies one importance ratio with one advantage per sequence.

    Its values are the host's advantages. Its gradient is that of the penalty as a per-token advantage: the host's
    ``-ratio * advantage`` then contributes ``ratio * sum_t penalty_t * grad log pi_t``, with the ratio clipped where
    the host clips it for the task's advantage (half way between the two where that advantage is 0).

    Args:
        advantages: (B,) normalised.
        penalty: (B, T), beta included, nats.
        logp: (B, T) the policy's log-probs, nats, with their graph.
        mask: (B, T) bool.
        averaged: the ratio is that of the mean log-prob, and the host repeats its product with the advantage on every
            token (GRPO); else it is that of the sum, and the product counts once (RLOO).

    Returns:
        (B,).
    """
    # where, not a product: a padded log-prob may be anything.
    live = (logp - logp.detach()).masked_fill(~mask, 0.0)
    total = (penalty.to(live) * live).sum(-1)
    return advantages - (total / mask.sum(-1).clamp(min=1) if averaged else total)
