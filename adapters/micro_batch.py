"""What a host is computing at the moment, for hooks in functions that do not get to know it by their arguments.

A host's KL function gets two tensors and the text of a spec. Which micro-batch they belong to, it does not say. So the
hook around the host's loss enters a :class:`LossBatch`, and the hook around the KL function finds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from kl_plugins.adapters.log_probs import OLD, SAMPLER, count_not_finite, finite_or, used
from kl_plugins.adapters.observe import HostKL, measured
from kl_plugins.adapters.session import Session
from kl_plugins.probe import Cells, HostTerm
from kl_plugins.term import kl_term

Kind = TypeVar("Kind")

_current: ContextVar[object] = ContextVar("kl_plugins_current", default=None)


@contextmanager
def entered(what: object) -> Iterator[None]:
    """Within the block, :func:`current` finds the object."""
    token = _current.set(what)
    try:
        yield
    finally:
        _current.reset(token)


def current(kind: type[Kind]) -> Kind | None:
    """Return what was entered last, if it is of this kind, else None."""
    found = _current.get()
    return found if isinstance(found, kind) else None


class KLSource:
    """Something that can say what the host's KL function should return."""

    def term(self, logp: Tensor, ref_logp: Tensor) -> Tensor:
        """Compute the (B, T) tensor that the host takes for its KL.

        Args:
            logp: (B, T) log-probs of the policy as the host passes them, nats.
            ref_logp: (B, T) log-probs of the reference, nats.
        """
        raise NotImplementedError

    def observe(self, logp: Tensor, ref_logp: Tensor, host: HostKL | HostTerm | None = None) -> None:
        """Measure the observed spec on what the host's KL function gets, and change nothing.

        Args:
            logp: (B, T) log-probs of the policy, nats.
            ref_logp: (B, T) log-probs of the reference, nats.
            host: the host's own KL function or what it does to each token, for probes.
        """
        raise NotImplementedError


def unknown_place(text: str, host_title: str, places: str) -> RuntimeError:
    """Make the error for a host's KL function that was called where nothing was entered that knows the KL.

    Args:
        text: the spec, as the host passes it.
        host_title: the host's name.
        places: where in the host a spec works.
    """
    return RuntimeError(
        f"kl-plugins: {text} reached {host_title}'s KL function from a place that kl-plugins does not know; {places}"
    )


@dataclass
class LossBatch(KLSource):
    """A micro-batch of a ``@loss`` or observed spec: its tensors beside policy and reference log-probs; all (B, T).

    Attributes:
        loss: what the host calls the code that computes one loss, for messages.
        session: of the process; it takes over the results as soon as they are there.
        mask: response tokens that the host trains on.
        old_logp: the trainer's log-probs at rollout time, nats, or None.
        sampler_logp: the sampler's, nats, or None.
        source: whose log-probs the importance weight divides by: ``sampler``, ``old``; anything else: no one's.
        exact: KL of the states, nats, where the spec needs it: over the whole vocabulary, or under ``top:`` over the
            kept tokens and one bucket.
        remainder: contribution of the sampled tokens that ``top:`` leaves out of ``exact``, nats.
        cells: for a probe of an observed spec with ``top:``.
        kl: the estimator's own values, detached, nats; filled by :meth:`term`.
        metrics: 0-d tensors; filled by :meth:`term` or :meth:`observe`.
    """

    loss: ClassVar[str] = "loss"

    session: Session
    mask: Tensor
    old_logp: Tensor | None
    sampler_logp: Tensor | None
    source: str = "unused"
    exact: Tensor | None = None
    remainder: Tensor | None = None
    cells: Cells | None = None
    kl: Tensor | None = field(default=None, repr=False)
    metrics: dict[str, Tensor] | None = None

    def term(self, logp: Tensor, ref_logp: Tensor) -> Tensor:
        """Compute the (B, T) term that the host aggregates and multiplies by its coefficient.

        Args:
            logp: policy log-probs with their graph, nats.
            ref_logp: reference log-probs, nats.

        Raises:
            RuntimeError: called twice in one loss.
        """
        session, spec = self.session, self.session.spec
        if self.metrics is not None:
            raise RuntimeError(
                f"kl-plugins: {session.host.title} asked for the KL of {spec} twice in one {self.loss}; that is not "
                "known"
            )
        given: dict[str, Any] = {"old": self.old_logp, "sampler": self.sampler_logp}
        entering = used(spec, self.source, policy=logp, reference=ref_logp, **given)
        # A log-prob that only metrics use does not stop the run.
        own = logp.detach()
        old = self.old_logp if OLD in entering else finite_or(self.old_logp, own)
        sampler = (
            self.sampler_logp if SAMPLER in entering else finite_or(self.sampler_logp, own if old is None else old)
        )
        states = {"exact": self.exact, "remainder": self.remainder}
        term = kl_term(spec, logp, ref_logp, self.mask, old_logp=old, sampler_logp=sampler, **states)
        self.metrics, self.kl = term.metrics, term.loss.detach()
        session.add(count_not_finite(entering, self.mask), own, ref_logp.detach(), self.mask)
        return term.loss

    def observe(self, logp: Tensor, ref_logp: Tensor, host: HostKL | HostTerm | None = None) -> None:
        """Measure the observed spec on the first KL that the host computes in this micro-batch; see the base class."""
        session = self.session
        if self.metrics is not None:
            return
        self.metrics, self.mask = measured(
            session.spec,
            logp,
            ref_logp,
            self.mask,
            old=self.old_logp,
            sampler=self.sampler_logp,
            source=self.source,
            probing=session.probing,
            host=host,
            truncated=session.truncated,
            exact=self.exact,
            remainder=self.remainder,
            cells=self.cells,
        )


@contextmanager
def carried(batch: LossBatch) -> Iterator[None]:
    """Within the block, the hook around the host's KL function finds the batch.

    Raises:
        RuntimeError: the block ended without a KL.
    """
    with entered(batch):
        yield
    if batch.metrics is None:
        host, spec = batch.session.host.title, batch.session.spec
        raise RuntimeError(
            f"kl-plugins: {host}'s {batch.loss} never asked for the KL of {spec}; it takes a path that kl-plugins does "
            "not know, and would train without the regulariser"
        )
