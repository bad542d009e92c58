"""The sampler's log-probs: known, or missing. OpenRLHF writes 0.0 for a missing one: a probability of 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MISSING = 2.0**-100
"""Marks a missing log-prob: no log-prob is positive, and in a difference of float32 log-probs it is OpenRLHF's 0.0."""


class Recorder:
    """Stands in for the engine that an executor generates with, and keeps its last output."""

    def __init__(self, engine: Any) -> None:
        """Take over an engine."""
        self._engine = engine
        self.output: Any = None

    async def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the engine does."""
        self.output = await self._engine.generate(*args, **kwargs)
        return self.output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def mark_missing(log_probs: list[float], start: int, tokens: Sequence[int], found: Sequence[Any]) -> None:
    """Mark, in place, the sampled tokens that vLLM gave no log-prob for.

    Args:
        log_probs: one number per token of prompt and response.
        start: position of the first response token.
        tokens: the response.
        found: vLLM's log-probs per response token, by token.
    """
    for position, (token, by_token) in enumerate(zip(tokens, found, strict=False), start):
        if by_token.get(token) is None:
            log_probs[position] = MISSING


def filled_up(log_probs: list[float], length: int) -> list[float]:
    """One number per token: those that an executor left out at the end are missing, and not 0.0 by later padding."""
    return log_probs + [MISSING] * (length - len(log_probs))


def unmarked(log_probs: Tensor | None, like: Tensor, required: bool) -> Tensor | None:
    """The sampler's log-probs with NaN for missing ones, so that one check finds them all.

    Args:
        log_probs: (B, T) of OpenRLHF's ``Experience``, nats, or None where the whole batch has none.
        like: (B, T) the trainer's log-probs, for the shape.
        required: a weight divides by the sampler's log-probs, so that without any all of them are missing.

    Returns:
        (B, T) nats, or None.
    """
    if log_probs is None:
        return torch.full_like(like, torch.nan) if required else None
    return log_probs.masked_fill(log_probs == MISSING, torch.nan)
