"""What a host's loss knows of a micro-batch, carried to the KL function that it calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from kl_plugins.adapters.log_probs import OLD, SAMPLER, count_not_finite, finite_or, used
from kl_plugins.spec import KLSpec
from kl_plugins.term import kl_term


@dataclass
class CarriedBatch:
    """Tensors of one loss beside policy and reference log-probs; all (B, T).

    Attributes:
        host: the host's name, for messages.
        loss: what the host calls the code that computes one loss, for messages.
        spec: a ``@loss`` spec.
        mask: response tokens that the host trains on.
        old_logp: the trainer's log-probs at rollout time, nats.
        sampler_logp: the sampler's, nats, or None.
        exact: full-vocabulary KL of the states, nats, where the spec needs it.
        source: whose log-probs the importance weight divides by: ``sampler``, ``old``; anything else: no one's.
        metrics: 0-d tensors, filled by :meth:`term`.
        observed: policy and reference log-probs, filled by :meth:`term`.
        not_finite: the counts of :func:`kl_plugins.adapters.log_probs.count_not_finite`, filled by :meth:`term`.
    """

    host: ClassVar[str]
    loss: ClassVar[str]

    spec: KLSpec
    mask: Tensor
    old_logp: Tensor
    sampler_logp: Tensor | None
    exact: Tensor | None = None
    source: str = "unused"
    metrics: dict[str, Tensor] | None = None
    observed: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    not_finite: Tensor | None = field(default=None, repr=False)

    def term(self, logp: Tensor, ref_logp: Tensor) -> Tensor:
        """The (B, T) term that the host aggregates and multiplies by its coefficient.

        Args:
            logp: policy log-probs with their graph, nats.
            ref_logp: reference log-probs, nats.

        Raises:
            RuntimeError: called twice in one loss.
        """
        if self.metrics is not None:
            raise RuntimeError(
                f"kl-plugins: {self.host} asked for the KL of {self.spec} twice in one {self.loss}; that is not known"
            )
        behaviour = {"old": self.old_logp, "sampler": self.sampler_logp}
        found = used(self.spec, self.source, policy=logp, reference=ref_logp, **behaviour)
        self.not_finite = count_not_finite(found, self.mask)
        # A log-prob that only metrics use does not stop the run.
        own = logp.detach()
        old = self.old_logp if OLD in found else finite_or(self.old_logp, own)
        sampler = self.sampler_logp if SAMPLER in found else finite_or(self.sampler_logp, own if old is None else old)
        term = kl_term(self.spec, logp, ref_logp, self.mask, old_logp=old, sampler_logp=sampler, exact=self.exact)
        self.metrics, self.observed = term.metrics, (own, ref_logp.detach())
        return term.loss


_current: ContextVar[CarriedBatch | None] = ContextVar("kl_plugins_micro_batch", default=None)


@contextmanager
def carried(batch: CarriedBatch) -> Iterator[None]:
    """Within the block, the hook around the host's KL function finds the batch.

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
            f"kl-plugins: {batch.host}'s {batch.loss} never asked for the KL of {batch.spec}; it takes a path that "
            "kl-plugins does not know, and would train without the regulariser"
        )


def current() -> CarriedBatch | None:
    """The batch of the loss that is being computed, or None outside of one."""
    return _current.get()
