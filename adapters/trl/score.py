"""``@reward`` and ``@advantage``: the penalty of a rollout, and what becomes of TRL's rewards and advantages."""

from __future__ import annotations

import torch
from torch import Tensor

COLUMN = "kl_penalty"
"""Name of the extra reward column in TRL's logs."""


def per_token(advantages: Tensor, penalty: Tensor, beta: float) -> Tensor:
    """Subtract beta times the penalty from advantages, for a host that takes (B, T).

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
    """Put the penalty into advantages, for a host that multiplies one importance ratio with one advantage per sequence.

    The values of the result are the host's advantages. Its gradient is that of the penalty as a per-token advantage:
    the host's ``-ratio * advantage`` then contributes ``ratio * sum_t penalty_t * grad log pi_t``, with the ratio
    clipped where the host clips it for the task's advantage (half way between the two where that advantage is 0).

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


def sequence_penalty(penalty: Tensor) -> Tensor:
    """Sum a penalty over the tokens of each completion.

    Args:
        penalty: (B, T), nats per unit beta.

    Returns:
        (B,), nats per unit beta.
    """
    return penalty.sum(-1)


def with_column(rewards_per_func: Tensor, penalty: Tensor) -> Tensor:
    """Add minus the KL of each completion to TRL's rewards, as one more column.

    A completion that no reward function could score stays unscorable: its KL alone is no reason to reinforce it.

    Args:
        rewards_per_func: (N, F) rewards of all processes, NaN where a function gave none.
        penalty: (N,) KL of each completion, nats.

    Returns:
        (N, F + 1).
    """
    unscorable = torch.isnan(rewards_per_func).all(dim=1)
    column = (-penalty.to(rewards_per_func)).masked_fill(unscorable, torch.nan)
    return torch.cat([rewards_per_func, column.unsqueeze(1)], dim=1)


def with_weight(weights: Tensor, beta: float) -> Tensor:
    """Add beta to TRL's reward weights, as the weight of the KL column.

    Args:
        weights: (F,) reward weights.
        beta: coefficient.

    Returns:
        (F + 1,).
    """
    return torch.cat([weights, torch.tensor([beta], dtype=weights.dtype).to(weights.device)])


def task_reward(rewards_per_func: Tensor, weights: Tensor) -> tuple[float, float]:
    """Return mean and standard deviation of the weighted task reward, without the KL column, over scorable completions.

    Args:
        rewards_per_func: (N, F) rewards of all processes.
        weights: (F,) reward weights.
    """
    scorable = ~torch.isnan(rewards_per_func).all(dim=1)
    total = (rewards_per_func * weights.to(rewards_per_func)).nansum(dim=1)[scorable]
    mean = total.mean().item() if total.numel() else float("nan")
    return mean, total.std().item() if total.numel() > 1 else float("nan")
