"""Functions that are sent by value to OpenRLHF's actors: float32, weights, processor time."""

from __future__ import annotations

from typing import Any


def allow_float32(actor: Any) -> None:
    """Add float32 to OpenRLHF's table of dtypes, which has only 16-bit dtypes."""
    import torch
    from openrlhf.utils import utils

    original = utils.convert_to_torch_dtype
    utils.convert_to_torch_dtype = lambda name: torch.float32 if name == "fp32" else original(name)


def load(actor: Any, weights: Any) -> None:
    """Load other weights into the policy."""
    import torch

    with torch.no_grad():
        for name, parameter in actor.actor.model.module.named_parameters():
            parameter.copy_(weights[name])


def weights(actor: Any) -> Any:
    """Return the policy's weights by name."""
    return {name: value.detach().clone() for name, value in actor.actor.model.module.named_parameters()}


def processor_seconds(actor: Any) -> float:
    """Return the processor time of the process so far, in seconds."""
    import time

    return time.process_time()
