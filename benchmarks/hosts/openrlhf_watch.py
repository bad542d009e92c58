"""Functions that are sent by value to OpenRLHF's actors and record what the training step does."""

from __future__ import annotations

from typing import Any


def start(actor: Any) -> None:
    """Record every training step from now on, without a change to any number."""
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
    """Stop the recording and return what was recorded."""
    actor.unwatched.remove()
    del actor.trainer.strategy.backward
    return actor.watched
