"""Functions that run inside OpenRLHF's actors, by value: float32, weights, and what its training step does."""

from __future__ import annotations

from typing import Any


def allow_float32(actor: Any) -> None:
    """One more entry in OpenRLHF's table of dtypes, which has 16 bits only."""
    import torch
    from openrlhf.utils import utils

    original = utils.convert_to_torch_dtype
    utils.convert_to_torch_dtype = lambda name: torch.float32 if name == "fp32" else original(name)


def load(actor: Any, weights: Any) -> None:
    """Give the policy other weights."""
    import torch

    with torch.no_grad():
        for name, parameter in actor.actor.model.module.named_parameters():
            parameter.copy_(weights[name])


def weights(actor: Any) -> Any:
    """The policy's weights by name."""
    return {name: value.detach().clone() for name, value in actor.actor.model.module.named_parameters()}


def processor_seconds(actor: Any) -> float:
    """What the process has taken of the processor."""
    import time

    return time.process_time()


def start(actor: Any) -> None:
    """Watch every training step from now on; the watch changes no number."""
    trainer = actor.trainer
    strategy = trainer.strategy
    seen: list[dict[str, Any]] = []
    losses: list[float] = []
    actor.watched = seen, losses

    def after(module: Any, given: Any, output: Any) -> None:
        logp = output[0] if isinstance(output, tuple) else output
        if not logp.requires_grad:
            return
        sequences, mask = given[0], given[1].bool()
        shown = sequences[:, -mask.shape[1] :]
        entry = {
            "responses": [row[on].tolist() for row, on in zip(shown, mask)],  # noqa: B905  runs under any Python
            "mask": mask.clone(),
            "log_probs": logp.detach().float().clone(),
            "pull": None,
        }

        def keep(gradient: Any) -> None:
            entry["pull"] = gradient.detach().float().clone()

        logp.register_hook(keep)
        seen.append(entry)

    backward = strategy.backward

    def recorded(loss: Any, *args: Any, **kwargs: Any) -> Any:
        # DeepSpeed divides every loss by the number of micro-batches per step.
        losses.append(float(loss.detach()) / strategy.accumulated_gradient)
        return backward(loss, *args, **kwargs)

    actor.unwatched = trainer.actor.register_forward_hook(after)
    strategy.backward = recorded


def stop(actor: Any) -> Any:
    """Give back what was seen, and end the watch."""
    actor.unwatched.remove()
    del actor.trainer.strategy.backward
    return actor.watched
