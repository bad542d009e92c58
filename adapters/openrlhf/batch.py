"""``@loss``: what OpenRLHF's training step knows is carried to its KL function, which gets the spec's term instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kl_plugins.adapters.log_probs import POLICY, count_not_finite, require_finite, used
from kl_plugins.adapters.micro_batch import CarriedBatch
from kl_plugins.adapters.openrlhf.sampler import unmarked
from kl_plugins.adapters.openrlhf.settings import behaviour_source
from kl_plugins.spec import KLSpec

if TYPE_CHECKING:
    from kl_plugins.adapters.openrlhf.session import Session


@dataclass
class MicroBatch(CarriedBatch):
    """What one training step of OpenRLHF's actor holds.

    Attributes:
        session: of the worker; it takes the results as soon as they are there.
        kl: (B, T) the estimator's own values, detached, nats; filled by :meth:`term`.
        difference: sum of |difference| of two references over the response tokens, nats, 0-d; of exact terms alone.
    """

    host, loss = "OpenRLHF", "training step"

    session: Session | None = None
    kl: Tensor | None = None
    difference: Tensor | None = None

    @classmethod
    def read(cls, session: Session, args: Any, experience: Any) -> MicroBatch:
        """Take the tensors out of OpenRLHF's ``Experience``.

        Args:
            session: of the worker.
            args: OpenRLHF's nested arguments.
            experience: one micro-batch.
        """
        source = behaviour_source(session.spec, args)
        old = experience.action_log_probs
        # An agent may return log-probs that nobody asked for: the receipt says what the weight divides by.
        given = None if source == "old" else experience.rollout_log_probs
        sampler = unmarked(given, old, source == "sampler")
        return cls(session.spec, experience.action_mask.bool(), old, sampler, source=source, session=session)

    def term(self, logp: Tensor, ref_logp: Tensor) -> Tensor:
        """See :meth:`CarriedBatch.term`; the session takes the results."""
        loss = super().term(logp, ref_logp)
        self.kl = loss.detach()
        if self.session is not None:
            self.session.take(self)
        return loss


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
