"""Functions that run inside OpenRLHF's actors, by value: float32, weights, processor time."""

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
