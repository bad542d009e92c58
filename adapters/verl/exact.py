"""KL of the states from the logits that veRL's engine shows its loss function, packed token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kl_plugins.adapters.log_probs import disagreement
from kl_plugins.adapters.top_k import label_log_probs, unpacked
from kl_plugins.adapters.verl.batch import MASK, REFERENCE, padded, response_rows
from kl_plugins.adapters.verl.top_k import carried
from kl_plugins.exact import exact_kl
from kl_plugins.spec import KLSpec

EXACT, REMAINDER = "kl_plugins_exact", "kl_plugins_remainder"
"""Keys in the engine's model output: the KL of each state, and under ``top:`` what its sampled token adds."""


def cost(spec: KLSpec) -> str:
    """Say what exact terms add to veRL's own work; empty for sampled specs."""
    if not spec.needs_exact:
        return ""
    if spec.top is not None:
        return f"{2 * spec.top + 1} numbers per token from the reference's pass"
    return "a forward pass of the reference with its logits (tokens x vocabulary) per micro-batch"


def packed_kl(
    spec: KLSpec, logits: Tensor, reference: Callable[[], Tensor], data: Any, overwritten: bool
) -> dict[str, Tensor]:
    """Compute KL(policy || reference) in the state of each packed position that predicts a response token; else 0.

    Args:
        spec: a spec with exact terms over the whole vocabulary.
        logits: (1, N, V) of the policy, scaled by the temperature, with their graph.
        reference: gives the logits of the reference.
        data: veRL's micro-batch.
        overwritten: veRL's own backward pass writes into the memory of ``logits``.

    Returns:
        (1, N) nats, float32, by key.
    """
    rows = response_rows(data)
    labels = _labels(data, rows.position).unsqueeze(0)
    with _with_gradient(spec):
        found = exact_kl(_kept_apart(logits, overwritten), reference(), labels)
    return {EXACT: found.kl}


def packed_top_k(spec: KLSpec, logits: Tensor, data: Any, overwritten: bool) -> tuple[dict[str, Tensor], float]:
    """Compute the KL over the reference's top-k tokens and one bucket, and the remainder; arguments as above.

    The numbers of the reference are those that the micro-batch carries.

    Returns:
        (1, N) nats, float32, by key; and by how much the log-probs of the response tokens differ between the numbers
        and the host's own, in nats: 0 where rounding explains it, infinity if there are too few numbers or too many. A
        rank that raised here would leave the others waiting.
    """
    rows = response_rows(data)
    labels = _labels(data, rows.position)
    numbers = carried(data, min(int(spec.top or 0), logits.shape[-1]), len(rows.position))
    if numbers is None:
        nothing = logits[..., 0].float() * 0
        return {EXACT: nothing, REMAINDER: nothing.detach()}, math.inf
    host = padded(data, REFERENCE)[rows.sequence, rows.step].float()
    kept = unpacked(numbers)  # of the temperature by which both models' logits are divided
    mask = padded(data, MASK)[rows.sequence, rows.step]
    difference = disagreement(label_log_probs(kept, labels[rows.position], host), host, mask, _rounded(logits, host))
    spread = numbers.new_zeros(len(labels), numbers.shape[-1])
    spread[rows.position] = numbers
    ref_logp = host.new_zeros(len(labels))
    ref_logp[rows.position] = host
    with _with_gradient(spec):
        found = exact_kl(
            _kept_apart(logits, overwritten),
            None,
            labels.unsqueeze(0),
            reference=unpacked(spread.unsqueeze(0)),
            ref_logp=ref_logp.unsqueeze(0),
        )
    return {EXACT: found.kl, REMAINDER: found.remainder}, difference or 0.0


def _labels(data: Any, position: Tensor) -> Tensor:
    """Return (N,) the next token of each packed position that predicts a response token, else -100."""
    tokens: Tensor = data["input_ids"].values()
    labels = torch.full_like(tokens, -100)
    labels[position] = tokens[position + 1]
    return labels


def _rounded(logits: Tensor, host: Tensor) -> bool:
    """Whether the host may have computed log-probs in 16 bits; the reference's settings need not be the policy's."""
    halves = (torch.bfloat16, torch.float16)
    return logits.dtype in halves or any(torch.equal(host, host.to(half).float()) for half in halves)


def _with_gradient(spec: KLSpec) -> torch.set_grad_enabled:
    # As returns of a sampled spec, exact terms are numbers.
    return torch.set_grad_enabled(torch.is_grad_enabled() and spec.estimator == "exact")


def _kept_apart(logits: Tensor, overwritten: bool) -> Tensor:
    return logits.clone() if overwritten and torch.is_grad_enabled() else logits
