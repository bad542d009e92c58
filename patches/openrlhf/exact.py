"""How exact terms get logits in OpenRLHF: from its actor as it trains, and from a reference in the same process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kl_plugins.adapters.openrlhf.exact import reference_difference, states_kl
from kl_plugins.adapters.openrlhf.loss import MicroBatch

Forward = Callable[[Any], Tensor]
"""Reference logits (B, L, V) of a micro-batch, scaled by the temperature."""


def reference_of(trainer: Any) -> Forward:
    """The reference's forward pass: the actor without its adapter under LoRA, else a second, frozen copy.

    Args:
        trainer: an ``ActorPPOTrainer``.
    """
    if trainer.args.ds.lora.rank > 0:
        return _without_adapter(trainer.actor, trainer.strategy)
    from openrlhf.trainer.ray.launcher import ReferenceModelActor

    host: Any = ReferenceModelActor.__ray_metadata__.modified_class

    class LocalReference(host):  # type: ignore[misc]
        """OpenRLHF's reference actor in a process whose process group is there already."""

        def __init__(self) -> None: ...

        def _setup_distributed(self, strategy: Any) -> None:
            self.strategy = strategy

    reference = LocalReference()
    reference.init_model_from_pretrained(trainer.strategy, trainer.args.actor.model_name_or_path)
    return lambda experience: _logits(reference.model, trainer.strategy, experience)


def _without_adapter(actor: Any, strategy: Any) -> Forward:
    def forward(experience: Any) -> Tensor:
        training = actor.training
        actor.eval()
        try:
            with actor.model.module.disable_adapter():
                return _logits(actor, strategy, experience)
        finally:
            actor.train(training)

    return forward


def _logits(model: Any, strategy: Any, experience: Any) -> Tensor:
    with torch.no_grad():
        _, output = model(
            experience.sequences,
            experience.action_mask,
            attention_mask=experience.attention_mask,
            return_output=True,
            ring_attn_group=strategy.ring_attn_group,
        )
    logits: Tensor = output["logits"]
    return logits


@contextmanager
def watching(trainer: Any, reference: Forward | None, batch: MicroBatch, experience: Any) -> Iterator[None]:
    """Within the block, the actor's forward pass gives the micro-batch the KL of its states.

    Args:
        trainer: an ``ActorPPOTrainer``.
        reference: from :func:`reference_of`; None where the spec has no exact terms, and nothing is done then.
        batch: gets the KL, and how far the reference is from OpenRLHF's own.
        experience: OpenRLHF's micro-batch.
    """
    if reference is None:
        yield
        return

    def after_actor(actor: Any, given: Any, output: Any) -> None:
        handle.remove()  # under LoRA the reference's pass is one of the same module
        logits = output[1]["logits"]
        found = states_kl(batch.spec, logits, lambda: reference(experience), experience, batch.sampler_logp)
        batch.difference = reference_difference(found, experience.base_action_log_probs, experience.action_mask)
        batch.exact = found.kl

    handle = trainer.actor.register_forward_hook(after_actor)
    try:
        yield
    finally:
        handle.remove()
