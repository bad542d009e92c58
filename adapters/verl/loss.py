"""``@loss``: what veRL's PPO loss knows is carried to its KL function, which gets the spec's term instead."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kl_plugins.adapters.micro_batch import CarriedBatch
from kl_plugins.spec import KLSpec

SAMPLER, OLD, MASK = "rollout_log_probs", "old_log_probs", "response_mask"
"""veRL's keys of the sampler's and the trainer's log-probs at rollout time, and of the response tokens."""


class MicroBatch(CarriedBatch):
    """What one call of veRL's PPO loss holds; its mask leaves out what veRL's rejection sampling dropped."""

    host, loss = "veRL", "loss"

    @classmethod
    def read(cls, spec: KLSpec, data: Any, receipt: str) -> MicroBatch:
        """Take the tensors out of veRL's nested or padded micro-batch.

        Args:
            spec: a ``@loss`` spec.
            data: veRL's micro-batch.
            receipt: what the receipt says about the behaviour policy's log-probs.

        Raises:
            ValueError: the sampler's log-probs are asked for and missing.
        """
        given = SAMPLER in data.keys()  # noqa: SIM118  TensorDict has no plain `in`
        source = divisor(spec, receipt, given)
        if source == "sampler" and not given:
            raise ValueError(
                f"kl-plugins: {spec} needs the sampler's log-probs, but the batch has no {SAMPLER}; set "
                "actor_rollout_ref.rollout.calculate_log_probs=True and use a rollout engine that returns them"
            )
        # A batch may hold log-probs that no setting asked for: the receipt says what the weight divides by.
        taken = given and (receipt != "old" or spec.behaviour is not None)
        return cls(
            spec,
            padded(data, MASK).bool(),
            padded(data, OLD),
            padded(data, SAMPLER) if taken else None,
            source=source,
        )


def padded(data: Any, key: str) -> Tensor:
    """(B, T) of a field that may be nested, zeros as padding."""
    field: Tensor = data[key]
    return field.to_padded_tensor(0) if field.is_nested else field


def divisor(spec: KLSpec, receipt: str, given: bool) -> str:
    """Whose log-probs the importance weight divides by: ``sampler``, ``old`` or ``unused``.

    Args:
        spec: a ``@loss`` spec.
        receipt: what the receipt says; ``automatic`` where a trainer of one's own leaves it to the batch.
        given: the batch holds the sampler's log-probs.
    """
    if not spec.needs_behaviour:
        return "unused"
    if spec.behaviour is not None:
        return spec.behaviour
    if receipt == "automatic":
        return "sampler" if given else "old"
    return receipt
