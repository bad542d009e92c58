"""The sampler's log-probs: known, or missing. OpenRLHF writes 0.0 for a missing one: a probability of 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kl_plugins.adapters.openrlhf.settings import behaviour_source
from kl_plugins.spec import KLSpec

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


def known(log_probs: Tensor) -> Tensor:
    """Where a tensor of the sampler's log-probs holds finite numbers that a sampler gave; bool, same shape."""
    return torch.isfinite(log_probs) & (log_probs != MISSING)


def refuse_missing(spec: KLSpec, args: Any, batches: Sequence[tuple[Tensor | None, Tensor]]) -> None:
    """Raise where weights need the sampler's log-probs and some are missing.

    Args:
        spec: a ``@loss`` spec.
        args: OpenRLHF's nested arguments.
        batches: log-probs (B, T) or None, and mask (B, T), of a rollout.

    Raises:
        ValueError: how many of how many response tokens, and what to do.
    """
    if behaviour_source(spec, args) != "sampler":
        return
    masks = [mask.bool() for _, mask in batches]
    tokens = sum(int(mask.sum()) for mask in masks)
    missing = sum(
        int(mask.sum() if found is None else (mask & ~known(found)).sum())
        for (found, _), mask in zip(batches, masks, strict=True)
    )
    if missing:
        raise ValueError(
            f"kl-plugins: the sampler gave no finite log-prob for {missing} of {tokens} response tokens, so their "
            f"importance weight under {spec} is unknown. An agent of your own has to return rollout_log_probs; else "
            "say behaviour:old in the spec. The last checkpoint is not affected."
        )


def usable(log_probs: Tensor | None, old: Tensor) -> Tensor | None:
    """The sampler's log-probs for metrics: old ones in the place of missing ones.

    Args:
        log_probs: (B, T), nats, or None.
        old: (B, T) the trainer's log-probs at rollout time, nats.
    """
    return None if log_probs is None else torch.where(known(log_probs), log_probs, old)
