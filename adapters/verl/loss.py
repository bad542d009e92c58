"""``@loss``: what veRL's PPO loss knows is carried to its KL function, which gets the spec's term instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kl_plugins.adapters.micro_batch import CarriedBatch
from kl_plugins.spec import KLSpec

SAMPLER, OLD, MASK = "rollout_log_probs", "old_log_probs", "response_mask"
"""veRL's keys of the sampler's and the trainer's log-probs at rollout time, and of the response tokens."""


class MicroBatch(CarriedBatch):
    """What one call of veRL's PPO loss holds; its mask leaves out what veRL's rejection sampling dropped."""

    host, loss = "veRL", "loss"

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
