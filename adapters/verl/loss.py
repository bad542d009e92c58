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
        metrics: 0-d tensors, filled by :meth:`term`.
        observed: policy and reference log-probs, filled by :meth:`term`.
    """

    spec: KLSpec
    mask: Tensor
    old_logp: Tensor
    sampler_logp: Tensor | None
    metrics: dict[str, Tensor] | None = None
    observed: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    @classmethod
    def read(cls, spec: KLSpec, data: Any, source: str) -> MicroBatch:
        """Take the tensors out of veRL's nested or padded micro-batch.

        Args:
            spec: a ``@loss`` spec.
            data: veRL's micro-batch.
            source: what the receipt says about the behaviour policy's log-probs.

        Raises:
            ValueError: the sampler's log-probs are asked for and missing, or not finite on response tokens.
        """
        mask = padded(data, MASK).bool()
        given = SAMPLER in data.keys() and not (source == "old" and spec.behaviour is None)  # noqa: SIM118  a TensorDict
        sampler = padded(data, SAMPLER) if given else None
        return cls(spec, mask, padded(data, OLD), _checked_sampler(spec, source, sampler, mask))

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
        term = kl_term(self.spec, logp, ref_logp, self.mask, old_logp=self.old_logp, sampler_logp=self.sampler_logp)
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


def _checked_sampler(spec: KLSpec, source: str, sampler: Tensor | None, mask: Tensor) -> Tensor | None:
    weighs = spec.needs_behaviour and spec.behaviour != "old"
    if sampler is None:
        if weighs and "sampler" in (source, spec.behaviour):
            raise ValueError(
                f"kl-plugins: {spec} needs the sampler's log-probs, but the batch has no {SAMPLER}; set "
                "actor_rollout_ref.rollout.calculate_log_probs=True and use a rollout engine that returns them"
            )
        return None
    unknown = int((~torch.isfinite(sampler) & mask).sum())
    if not unknown:
        return sampler
    if not weighs:
        return None  # for metrics only: not worth stopping for
    raise ValueError(
        f"kl-plugins: the sampler gave no finite log-prob for {unknown} of {int(mask.sum())} response tokens, so their "
        f"importance weight under {spec} is unknown. Check the rollout engine's log-probs, or say behaviour:old "
        "in the spec. "
        "The last checkpoint is not affected."
    )
