"""``@reward``: the penalty as TRL's rewards see it, one number per completion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

COLUMN = "kl_penalty"
"""Name of the extra reward column in TRL's logs."""


def sequence_penalty(penalty: Tensor) -> Tensor:
    """(B,) sum over a completion's tokens of the (B, T) penalty, nats per unit beta."""
    return penalty.sum(-1)


def with_column(rewards_per_func: Tensor, penalty: Tensor) -> Tensor:
    """TRL's rewards with minus the KL of each completion as one more column.

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


def task_reward(rewards_per_func: Tensor, weights: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the weighted task reward, without the KL column, over scorable completions.

    Args:
        rewards_per_func: (N, F) rewards of all processes.
        weights: (F,) reward weights.
    """
    scorable = ~torch.isnan(rewards_per_func).all(dim=1)
    total = (rewards_per_func * weights.to(rewards_per_func)).nansum(dim=1)[scorable]
    mean = total.mean().item() if total.numel() else float("nan")
    return mean, total.std().item() if total.numel() > 1 else float("nan")


def site(algorithm: str, config: Any) -> str:
    """What this host does with a KL in the reward, for the receipt."""
    if algorithm == "RLOO":
        after = ", then advantages divided by their std" if getattr(config, "normalize_advantages", False) else ""
        return f"RLOO's own: reward - beta * KL of the completion, then the leave-one-out baseline{after}"
    scale = str(config.scale_rewards)
    after = "" if scale == "none" else f", then division by the {scale}'s std (with tied rewards beta cancels)"
    quantile = getattr(config, "top_entropy_quantile", 1.0)
    kept = f"; tokens of low entropy get none of it (top_entropy_quantile {quantile:g})" if quantile < 1 else ""
    return f"reward - beta * KL of the completion, then the group mean is subtracted{after}{kept}"
