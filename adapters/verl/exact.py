"""Full-vocabulary KL from the logits that veRL's engine shows its loss function, packed token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kl_plugins.adapters.verl.loss import OLD, SAMPLER, padded
from kl_plugins.exact import exact_kl
from kl_plugins.spec import KLSpec
from kl_plugins.term import behaviour_log_probs

LOGITS = "student_logits"
"""Argument under which veRL's engine hands (1, N, V) temperature-scaled logits to a loss function."""

KEY = "kl_plugins_exact"
"""Key of the KL per token in the engine's model output."""


def cost(spec: KLSpec) -> str:
    """What exact terms add to veRL's own work, in words; empty for sampled specs."""
    if not spec.needs_exact:
        return ""
    return "a forward pass of the reference with its logits (tokens x vocabulary) per micro-batch"


class Rows(NamedTuple):
    """Which packed positions predict response tokens, and where those stand in the padded (B, T).

    Attributes:
        position: (n,) index into the packed tokens of the micro-batch.
        sequence: (n,) row of the padded tensors.
        step: (n,) column of the padded tensors.
    """

    position: Tensor
    sequence: Tensor
    step: Tensor


def response_rows(data: Any) -> Rows:
    """Find the positions whose next token is a response token.

    Args:
        data: veRL's micro-batch; its ``input_ids`` are prompts and responses, packed; its ``responses`` are nested, or
            (B, T) padded on the right, as the older trainer has them.
    """
    ends, responses = data["input_ids"].offsets()[1:], data["responses"]
    if responses.is_nested:
        lengths = responses.offsets().diff()
    else:
        lengths = data["attention_mask"][:, -responses.shape[1] :].sum(-1)
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    step = torch.arange(len(sequence), device=lengths.device) - (lengths.cumsum(0) - lengths)[sequence]
    return Rows((ends - lengths - 1)[sequence] + step, sequence, step)


def packed_kl(
    spec: KLSpec, logits: Tensor, reference: Callable[[], Tensor], data: Any, source: str, overwritten: bool
) -> Tensor:
    """KL(policy || reference) in the state of each packed position that predicts a response token; 0 elsewhere.

    Args:
        spec: a spec with exact terms.
        logits: (1, N, V) of the policy, scaled by the temperature, with their graph.
        reference: gives the same of the reference.
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
    if spec.top is not None and spec.needs_behaviour:
        sampler = padded(data, SAMPLER) if SAMPLER in data.keys() and source != "old" else None  # noqa: SIM118
        chosen = behaviour_log_probs(spec, padded(data, OLD), sampler)
        assert chosen is not None
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
