"""``@loss``: what OpenRLHF's training step knows is carried to its KL function, which gets the spec's term instead."""

from __future__ import annotations

from typing import Any

from kl_plugins.adapters.micro_batch import CarriedBatch
from kl_plugins.adapters.openrlhf.sampler import refuse_missing, usable
from kl_plugins.adapters.openrlhf.settings import behaviour_source
from kl_plugins.spec import KLSpec


class MicroBatch(CarriedBatch):
    """What one training step of OpenRLHF's actor holds."""

    host, loss = "OpenRLHF", "training step"

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
