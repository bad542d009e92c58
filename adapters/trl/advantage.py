"""``@advantage``: the penalty after normalisation, token by token."""

from __future__ import annotations

from torch import Tensor


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


def per_sequence(advantages: Tensor, penalty: Tensor, logp: Tensor, mask: Tensor) -> Tensor:
    """The same for a host that multiplies one importance ratio with one advantage per sequence (RLOO).

    Its values are the host's advantages. Its gradient is that of the penalty as a per-token advantage: the host's
    ``-ratio * advantage`` then contributes ``ratio * sum_t penalty_t * grad log pi_t``.

    Args:
        advantages: (B,) normalised.
        penalty: (B, T), beta included, nats.
        logp: (B, T) the policy's log-probs, nats, with their graph.
        mask: (B, T) bool.

    Returns:
        (B,).
    """
    # where, not a product: a padded log-prob may be anything.
    live = (logp - logp.detach()).masked_fill(~mask, 0.0)
    return advantages - (penalty.to(live) * live).sum(-1)
