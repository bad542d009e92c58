"""Full-vocabulary KL from the logits that veRL's engine shows its loss function, packed token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kl_plugins.adapters.micro_batch import divisor_of_remainder
from kl_plugins.adapters.verl.batch import OLD, SAMPLER, padded, response_rows
from kl_plugins.exact import exact_kl
from kl_plugins.spec import KLSpec

LOGITS = "student_logits"
"""Argument under which veRL's engine hands (1, N, V) temperature-scaled logits to a loss function."""

KEY = "kl_plugins_exact"
"""Key of the KL per token in the engine's model output."""


def cost(spec: KLSpec) -> str:
    """Say what exact terms add to veRL's own work; empty for sampled specs."""
    if not spec.needs_exact:
        return ""
    return "a forward pass of the reference with its logits (tokens x vocabulary) per micro-batch"


def packed_kl(
    spec: KLSpec, logits: Tensor, reference: Callable[[], Tensor], data: Any, source: str, overwritten: bool
) -> Tensor:
    """Compute KL(policy || reference) in the state of each packed position that predicts a response token; else 0.

    Args:
        spec: a spec with exact terms.
        logits: (1, N, V) of the policy, scaled by the temperature, with their graph.
        reference: gives the logits of the reference.
        data: veRL's micro-batch.
        source: what the receipt says about the behaviour policy's log-probs.
        overwritten: veRL's own backward pass writes into the memory of ``logits``.

    Returns:
        (1, N) nats, float32.
    """
    rows = response_rows(data)
    tokens = data["input_ids"].values()
    labels = torch.full_like(tokens, -100)
    labels[rows.position] = tokens[rows.position + 1]
    behaviour = None
    sampler = padded(data, SAMPLER) if SAMPLER in data.keys() and source != "old" else None  # noqa: SIM118
    chosen = divisor_of_remainder(spec, padded(data, OLD), sampler)
    if chosen is not None:
        behaviour = torch.zeros(tokens.shape, dtype=chosen.dtype, device=tokens.device)
        behaviour[rows.position] = chosen[rows.sequence, rows.step]
        behaviour = behaviour.unsqueeze(0)
    with torch.set_grad_enabled(torch.is_grad_enabled() and spec.estimator == "exact"):
        found = exact_kl(
            logits.clone() if overwritten and torch.is_grad_enabled() else logits,
            reference(),
            labels.unsqueeze(0),
            top=spec.top,
            behaviour_logp=behaviour,
        )
    return found.kl
