"""Functions that are sent by value to veRL's worker and record the inputs of its loss function and their gradients."""

from __future__ import annotations

from typing import Any


def start(process: Any) -> None:
    """Record every call of veRL's PPO loss from now on, without a change to any number."""
    import torch
    from verl.workers.utils import losses

    seen: list[dict[str, Any]] = []
    values: list[float] = []
    process.watched = seen, values
    process.unwatched = losses.no_padding_2_padding, process.engine.forward_step
    padded, forward_step = process.unwatched

    def watching(tensor: Any, data: Any) -> Any:
        found = padded(tensor, data)
        if found.requires_grad and not seen_now:
            responses = [row.tolist() for row in data["responses"].unbind()]
            lengths = torch.tensor([len(row) for row in responses])
            entry = {
                "responses": responses,
                "mask": torch.arange(found.shape[1]) < lengths[:, None],
                "log_probs": found.detach().float().clone(),
                "pull": 0,
            }

            def keep(gradient: Any) -> None:
                entry["pull"] = entry["pull"] + gradient.detach().float().clone()

            found.register_hook(keep)
            seen.append(entry)
            seen_now.append(True)
        return found

    seen_now: list[bool] = []

    def stepping(*args: Any, **kwargs: Any) -> Any:
        seen_now.clear()
        loss, output = forward_step(*args, **kwargs)
        values.append(float(loss.detach()))
        return loss, output

    losses.no_padding_2_padding, process.engine.forward_step = watching, stepping


def stop(process: Any) -> Any:
    """Restore veRL's own functions and return what was recorded."""
    from verl.workers.utils import losses

    losses.no_padding_2_padding, process.engine.forward_step = process.unwatched
    return process.watched
