"""The reference's k most probable tokens in each state, which a nearly exact KL needs instead of its logits.

The reference's forward pass computes them together with its log-probs, possibly in another process. They are then
passed to ``exact_kl`` or ``linear_kl`` instead of the reference's logits, see ``docs/exact.md``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kl_plugins.kernels.exact.arguments import check_floats, check_head, flat_rows, row_options
from kl_plugins.kernels.exact.linear import default_tile_bytes, step_of
from kl_plugins.kernels.exact.products import Head, operand_dtype
from kl_plugins.kernels.exact.reference import Drawing, RefDraws, RefTopK, reference_rows

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RefDraws", "RefTopK", "linear_reference_top_k", "reference_top_k"]


@torch.no_grad()
def reference_top_k(
    logits: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    labels: Tensor | None = None,
    draws: int = 0,
    generator: torch.Generator | None = None,
    max_tile_bytes: int | None = None,
) -> RefTopK:
    """Return the k most probable tokens of each position, their log-probs, and the log-prob of all other tokens.

    Args:
        logits: (..., V) logits of the reference, any float dtype.
        k: number of tokens; the whole vocabulary if it has fewer.
        temperature: divides the logits; it must be the policy's temperature.
        softcap: final logit soft-cap, for logits that were taken before the model's own capping.
        labels: (...) int64 tokens; a negative label stands for token 0. Only draws need them.
        draws: number of tokens that are drawn from all others, as
            :func:`~kl_plugins.top_k.top_and_drawn_tokens` draws them.
        generator: source of their random numbers, on the device of the logits; torch's own by default.
        max_tile_bytes: upper limit of temporary memory in bytes. Argument and results are not counted, and the
            temporaries of at least one row are allocated.

    Returns:
        ids (..., k) int64, logp (..., k) and log_tail (...), float32 (float64 for float64 logits), nats; and the draws.

    Raises:
        ValueError: if a shape or option is invalid, or draws have no labels.
        TypeError: if the logits are not floating-point numbers.
    """
    check_floats(logits=logits)
    if logits.dim() < 1:
        raise ValueError(f"logits {tuple(logits.shape)} must be (..., V)")
    options = row_options(temperature, softcap, None, "auto", max_tile_bytes)
    drawing = _drawing(labels, draws, generator, logits.shape[:-1])
    found = reference_rows(flat_rows(logits), _checked(k), options, drawing)
    return _shaped([found], logits.shape[:-1], temperature)


@torch.no_grad()
def linear_reference_top_k(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    labels: Tensor | None = None,
    draws: int = 0,
    generator: torch.Generator | None = None,
    max_tile_bytes: int | None = None,
) -> RefTopK:
    """Compute :func:`reference_top_k` from the input of the output head: only one tile of the logits exists at a time.

    Args:
        hidden: (..., D) final hidden states of the reference.
        weight: (V, D) weight of its head, not sharded (under FSDP, call where the head is gathered).
        k, temperature, softcap, labels, draws, generator: as in :func:`reference_top_k`.
        bias: (V,) bias of the head, None for no bias.
        max_tile_bytes: upper limit of temporary memory in bytes. Arguments and results are not counted, and the logits
            of at least one row are allocated.

    Returns:
        The same as :func:`reference_top_k`.

    Raises:
        ValueError: if a shape or option is invalid.
        TypeError: if a dtype is not supported, or the weight is sharded.
    """
    check_floats(hidden=hidden, weight=weight)
    check_head(hidden, weight, bias, "")
    tile_bytes = max_tile_bytes or default_tile_bytes(hidden, weight.shape[0])
    options = row_options(temperature, softcap, None, "auto", max(1, tile_bytes // 2))
    operands, rows = operand_dtype(hidden, weight), flat_rows(hidden)
    drawing = _drawing(labels, draws, generator, hidden.shape[:-1])
    with torch.autocast(hidden.device.type, enabled=False):
        head = Head(weight, bias, operands, tile_bytes // 8)
        step = step_of(len(rows), tile_bytes // 2 // max(1, weight.shape[0] * head.compute.itemsize), 1)
        buffer = torch.empty(step, weight.shape[0], dtype=head.compute, device=hidden.device)
        parts = []
        for start in range(0, max(1, len(rows)), step):
            part = rows[start : start + step]
            of_part = drawing and drawing._replace(labels=drawing.labels[start : start + step])
            parts.append(reference_rows(head.logits(part, buffer[: len(part)]), _checked(k), options, of_part))
    return _shaped(parts, hidden.shape[:-1], temperature)


def _checked(k: int) -> int:
    if k < 1:
        raise ValueError(f"k={k}: must be at least 1")
    return k


def _drawing(labels: Tensor | None, draws: int, generator: torch.Generator | None, shape: torch.Size) -> Drawing | None:
    if draws < 0 or (draws and (labels is None or labels.shape != shape)):
        given = None if labels is None else tuple(labels.shape)
        raise ValueError(f"draws={draws} with labels {given}: draws need labels {tuple(shape)}")
    if not draws or labels is None:
        return None
    return Drawing(labels.reshape(-1).long().clamp_min(0), draws, generator)


def _shaped(parts: list[RefTopK], shape: torch.Size, temperature: float) -> RefTopK:
    def joined(*tensors: Tensor) -> Tensor:
        found = torch.cat(tensors)
        return found.reshape(*shape, *found.shape[1:])

    ids, logp, log_tail, _, draws = zip(*parts, strict=True)
    given = None if draws[0] is None else RefDraws(*(joined(*tensors) for tensors in zip(*draws, strict=True)))
    return RefTopK(joined(*ids), joined(*logp), joined(*log_tail), temperature, given)
