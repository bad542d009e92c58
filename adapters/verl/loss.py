"""``@loss``: what veRL's PPO loss knows is carried to its KL function, which gets the spec's term instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kl_plugins.spec import KLSpec
from kl_plugins.term import kl_term

SAMPLER, OLD, MASK = "rollout_log_probs", "old_log_probs", "response_mask"
"""veRL's keys of the sampler's and the trainer's log-probs at rollout time, and of the response tokens."""


@dataclass
class MicroBatch:
    """What one call of veRL's PPO loss holds beside policy and reference log-probs; all (B, T).

    Attributes:
        spec: a ``@loss`` spec.
        mask: response tokens that veRL trains on; tokens that its rejection sampling dropped are out.
        old_logp: the trainer's log-probs at rollout time, nats.
        sampler_logp: the sampler's, nats, or None.
        exact: full-vocabulary KL of the states, nats, where the spec needs it.
        metrics: 0-d tensors, filled by :meth:`term`.
        observed: policy and reference log-probs, filled by :meth:`term`.
    """

    spec: KLSpec
    mask: Tensor
    old_logp: Tensor
    sampler_logp: Tensor | None
    exact: Tensor | None = None
    metrics: dict[str, Tensor] | None = None
    observed: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    @classmethod
    def read(cls, spec: KLSpec, data: Any, source: str, sampler_usable: bool) -> MicroBatch:
        """Take the tensors out of veRL's nested or padded micro-batch.

        Args:
            spec: a ``@loss`` spec.
            data: veRL's micro-batch.
            source: what the receipt says about the behaviour policy's log-probs.
            sampler_usable: False where some of the sampler's log-probs are not finite; no metric is made of them then.

        Raises:
            ValueError: the sampler's log-probs are asked for and missing.
        """
        mask = padded(data, MASK).bool()
        given = SAMPLER in data.keys()  # noqa: SIM118  TensorDict has no plain `in`
        if not given and "sampler" in (source, spec.behaviour) and weighs_by_sampler(spec, source):
            raise ValueError(
                f"kl-plugins: {spec} needs the sampler's log-probs, but the batch has no {SAMPLER}; set "
                "actor_rollout_ref.rollout.calculate_log_probs=True and use a rollout engine that returns them"
            )
        used = given and sampler_usable and not (source == "old" and spec.behaviour is None)
        return cls(spec, mask, padded(data, OLD), padded(data, SAMPLER) if used else None)

    def term(self, logp: Tensor, ref_logp: Tensor) -> Tensor:
        """The (B, T) term that veRL aggregates and multiplies by its coefficient.

        Args:
            logp: policy log-probs with their graph, nats.
            ref_logp: reference log-probs, nats.

        Raises:
            RuntimeError: called twice in one loss, or with other shapes than the batch has.
        """
        if self.metrics is not None:
            raise RuntimeError(
                f"kl-plugins: veRL asked for the KL of {self.spec} twice in one loss; this loss is not known"
            )
        behaviour = {"old_logp": self.old_logp, "sampler_logp": self.sampler_logp}
        term = kl_term(self.spec, logp, ref_logp, self.mask, **behaviour, exact=self.exact)
        self.metrics, self.observed = term.metrics, (logp.detach(), ref_logp.detach())
        return term.loss


_current: ContextVar[MicroBatch | None] = ContextVar("kl_plugins_verl_micro_batch", default=None)


@contextmanager
def carried(batch: MicroBatch) -> Iterator[None]:
    """Within the block, the hook around veRL's KL function finds the batch.

    Raises:
        RuntimeError: the block ended without a KL.
    """
    token = _current.set(batch)
    try:
        yield
    finally:
        _current.reset(token)
    if batch.metrics is None:
        raise RuntimeError(
            f"kl-plugins: veRL's loss never asked for the KL of {batch.spec}; it takes a path that kl-plugins "
            "does not know, "
            "and would train without the regulariser"
        )


def current() -> MicroBatch | None:
    """The batch of the loss that is being computed, or None outside of one."""
    return _current.get()


def padded(data: Any, key: str) -> Tensor:
    """(B, T) of a field that may be nested, zeros as padding."""
    field: Tensor = data[key]
    return field.to_padded_tensor(0) if field.is_nested else field


def weighs_by_sampler(spec: KLSpec, source: str) -> bool:
    """Whether the sampler's log-probs enter the weight, given what the receipt says about the behaviour policy."""
    return spec.needs_behaviour and spec.behaviour != "old" and (source != "old" or spec.behaviour == "sampler")


def unknown_tokens(data: Any) -> tuple[int, int]:
    """Response tokens whose sampler log-prob is not finite, and all response tokens; 0 of them without a sampler.

    Args:
        data: veRL's mini-batch, nested or padded.
    """
    mask = padded(data, MASK).bool()
    if SAMPLER not in data.keys():  # noqa: SIM118  TensorDict has no plain `in`
        return 0, int(mask.sum())
    return int((~torch.isfinite(padded(data, SAMPLER)) & mask).sum()), int(mask.sum())


def refuse_unknown(spec: KLSpec, unknown: int, tokens: int) -> None:
    """Raise for response tokens whose weight is unknown; the counts are those of all ranks, so that all of them stop.

    Raises:
        ValueError: there are some.
    """
    if unknown:
        raise ValueError(
            f"kl-plugins: the sampler gave no finite log-prob for {unknown} of {tokens} response tokens, so their "
            f"importance weight under {spec} is unknown. Check the rollout engine's log-probs, or say behaviour:old in "
            "the spec. The last checkpoint is not affected."
        )
