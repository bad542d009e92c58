"""``@loss``: what OpenRLHF's training step knows is carried to its KL function, which gets the spec's term instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kl_plugins.adapters.openrlhf.sampler import refuse_missing, usable
from kl_plugins.adapters.openrlhf.settings import behaviour_source
from kl_plugins.spec import KLSpec
from kl_plugins.term import kl_term


@dataclass
class MicroBatch:
    """What one training step holds beside policy and reference log-probs; all (B, T).

    Attributes:
        spec: a ``@loss`` spec.
        mask: response tokens.
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
    def read(cls, spec: KLSpec, args: Any, experience: Any) -> MicroBatch:
        """Take the tensors out of OpenRLHF's ``Experience``.

        Args:
            spec: a ``@loss`` spec.
            args: OpenRLHF's nested arguments.
            experience: one micro-batch.

        Raises:
            ValueError: the sampler's log-probs are asked for and missing.
        """
        mask, old, sampler = experience.action_mask.bool(), experience.action_log_probs, experience.rollout_log_probs
        refuse_missing(spec, args, [(sampler, mask)])
        # An agent may return log-probs that nobody asked for: the receipt says what the weight divides by.
        used = behaviour_source(spec, args) != "old"
        return cls(spec, mask, old, usable(sampler, old) if used else None)

    def term(self, logp: Tensor, ref_logp: Tensor) -> Tensor:
        """The (B, T) term that OpenRLHF aggregates and multiplies by its coefficient.

        Args:
            logp: policy log-probs with their graph, nats.
            ref_logp: reference log-probs, nats.

        Raises:
            RuntimeError: called twice in one training step.
        """
        if self.metrics is not None:
            raise RuntimeError(
                f"kl-plugins: OpenRLHF asked for the KL of {self.spec} twice in one training step; this trainer is not "
                "known"
            )
        behaviour = {"old_logp": self.old_logp, "sampler_logp": self.sampler_logp}
        term = kl_term(self.spec, logp, ref_logp, self.mask, **behaviour, exact=self.exact)
        self.metrics, self.observed = term.metrics, (logp.detach(), ref_logp.detach())
        return term.loss


_current: ContextVar[MicroBatch | None] = ContextVar("kl_plugins_openrlhf_micro_batch", default=None)


@contextmanager
def carried(batch: MicroBatch) -> Iterator[None]:
    """Within the block, the hook around OpenRLHF's KL function finds the batch.

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
            f"kl-plugins: OpenRLHF's training step never asked for the KL of {batch.spec}; it takes a path that "
            "kl-plugins does not know, and would train without the regulariser"
        )


def current() -> MicroBatch | None:
    """The batch of the training step that is under way, or None outside of one."""
    return _current.get()
