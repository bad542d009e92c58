"""What OpenRLHF's tensors mean: a micro-batch of its training step, and the sampler's log-probs, known or missing.

OpenRLHF writes 0.0 where a log-prob of the sampler is missing, which would be a probability of 1. So the hooks around
generation mark missing ones with :data:`MISSING`, and training reads the mark as NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kl_plugins.adapters.log_probs import POLICY, count_not_finite, require_finite, used
from kl_plugins.adapters.micro_batch import LossBatch
from kl_plugins.adapters.observe import warn_not_of_these_tokens
from kl_plugins.adapters.openrlhf import HOST
from kl_plugins.adapters.openrlhf.config import behaviour_source
from kl_plugins.adapters.openrlhf.top_k import arrived
from kl_plugins.adapters.top_k import KEY
from kl_plugins.spec import KLSpec

if TYPE_CHECKING:
    from kl_plugins.adapters.openrlhf.session import WorkerSession

MISSING = 2.0**-100
"""Marks a missing log-prob: no log-prob is positive, and in a difference of float32 log-probs it is OpenRLHF's 0.0."""


@dataclass
class MicroBatch(LossBatch):
    """What one training step of OpenRLHF's actor holds.

    Attributes:
        numbers: (n, 2 k + 1) what ``top:`` keeps of the reference for the n response tokens, or None.
        fits: whether each sequence has as many of them as response tokens.
    """

    loss = "training step"

    session: WorkerSession
    numbers: Tensor | None = None
    fits: bool = True

    @classmethod
    def read(cls, session: WorkerSession, experience: Any) -> MicroBatch:
        """Take the tensors out of OpenRLHF's ``Experience``.

        Args:
            session: of the worker.
            experience: one micro-batch.

        Raises:
            RuntimeError: it lacks what ``top:`` needs of the reference.
        """
        source, old = session.behaviour, experience.action_log_probs
        # An agent may return log-probs that were not requested: the receipt says what the weight divides by.
        unwanted = source == "old" and session.observation is None
        given = None if unwanted else experience.rollout_log_probs
        sampler = unmarked(given, old, source == "sampler" and session.observation is None)
        batch = cls(session, experience.action_mask.bool(), old, sampler, source)
        if session.spec.top is None:
            return batch
        if session.observation is None or KEY in experience.info:
            batch.numbers, batch.fits = arrived(session.spec, experience)
        if session.observation is not None and (batch.numbers is None or not batch.fits):
            batch.numbers = None  # an observation does not stop a run
            warn_not_of_these_tokens(HOST.title, session.observation)
        return batch


def check_rollout(spec: KLSpec, args: Any, samples: Sequence[Any]) -> None:
    """Raise where log-probs of a rollout batch are not finite, before workers train on it.

    Args:
        spec: a ``@loss`` spec.
        args: OpenRLHF's nested arguments.
        samples: OpenRLHF's, with the log-probs of policy and reference.

    Raises:
        LogProbError: whose log-probs, and on how many response tokens.
        RuntimeError: there are no reference log-probs.
    """
    source = behaviour_source(spec, args)
    counts = None
    for batch in samples:
        old, reference = batch.action_log_probs, batch.base_action_log_probs
        if reference is None:
            raise RuntimeError(
                f"kl-plugins: OpenRLHF has no reference log-probs for {spec}; is there a reference model?"
            )
        sampler = unmarked(batch.rollout_log_probs, old, source == "sampler")
        found = used(spec, source, policy=old, reference=reference, old=old, sampler=sampler)
        del found[POLICY]  # its log-probs are those of the training step
        found = {name: values.to(batch.action_mask.device) for name, values in found.items()}
        number = count_not_finite(found, batch.action_mask)
        counts = number if counts is None else counts + number
    if counts is not None:
        require_finite(counts, spec)


class OutputKeeper:
    """Stands in for the engine that an executor generates with, and keeps the engine's last output.

    Attributes:
        output: what the engine's last ``generate`` returned.
    """

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
    """Mark as missing what an executor left out at the end; OpenRLHF's padding would make it 0.0 later.

    Args:
        log_probs: one number per token, from the first one on.
        length: number of tokens.

    Returns:
        One number per token.
    """
    return log_probs + [MISSING] * (length - len(log_probs))


def unmarked(log_probs: Tensor | None, like: Tensor, required: bool) -> Tensor | None:
    """Read the sampler's log-probs, with NaN for missing ones, so that one check finds them all.

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
