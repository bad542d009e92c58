"""Checks of the arguments of the exact functions: shapes, dtypes and options, before anything is computed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kl_plugins.kernels.exact.reference import RefTopK
from kl_plugins.kernels.exact.statistics import IGNORE_INDEX, Options


def flat_rows(tensor: Tensor) -> Tensor:
    """Reshape (..., n) to (N, n), and copy only if the last dimension is not contiguous."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def check_floats(**tensors: Tensor) -> None:
    """Raise unless all tensors hold floating-point numbers, are not sharded, and are on one device."""
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) > 1:
        raise ValueError(
            "all tensors must be on one device: " + ", ".join(f"{n} {t.device}" for n, t in tensors.items())
        )
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} holds {tensor.dtype}, expected floating point")
        if hasattr(tensor, "placements"):
            raise TypeError(f"{name} is a DTensor: gather it first (under FSDP, call where the head is unsharded)")


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str) -> None:
    """Raise unless the shapes of an output head fit its hidden states."""
    if hidden.dim() < 1 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{prefix}weight {tuple(weight.shape)} must be (V, D) for {prefix}hidden {tuple(hidden.shape)}; "
            "a sharded head has to be gathered first"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{prefix}bias {tuple(bias.shape)} must be (V,) = {tuple(weight.shape[:1])}")


def checked_labels(labels: Tensor, mask: Tensor | None, shape: torch.Size) -> Tensor:
    """Return the labels as int64, with the ignored label where the mask is False."""
    if labels.shape != shape or (mask is not None and mask.shape != shape):
        given = f"labels {tuple(labels.shape)}" + ("" if mask is None else f", mask {tuple(mask.shape)}")
        raise ValueError(f"{given}: must be {tuple(shape)}, one per position")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels hold {labels.dtype}, expected token ids")
    labels = labels.long()
    return labels if mask is None else labels.masked_fill(~mask.bool(), IGNORE_INDEX)


def row_options(
    temperature: float, softcap: float | None, ref_softcap: float | None, backend: str, tile_bytes: int | None
) -> Options:
    """Check the options of a call and return them."""
    for name, value in (("temperature", temperature), ("softcap", softcap), ("ref_softcap", ref_softcap)):
        if value is not None and not (0 < value < math.inf):
            raise ValueError(f"{name}={value}: must be finite and above 0")
    if tile_bytes is not None and tile_bytes <= 0:
        raise ValueError(f"max_tile_bytes={tile_bytes}: must be above 0")
    return Options(1.0 / temperature, softcap, ref_softcap, backend, tile_bytes)


def checked_reference(
    reference: RefTopK,
    ref_logp: Tensor | None,
    labels: Tensor,
    shape: torch.Size,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Check a top-k reference and return it by row.

    Args:
        reference: the reference's most probable tokens at all positions.
        ref_logp: log-probs of the labels under the reference, nats.
        labels: (N,) int64.
        shape: shape of the positions.
        options: options of the policy.

    Returns:
        (N, k) token ids as int64, (N, k) their log-probs, (N,) log-probability of the tail, and (N,) log-prob of the
        label, all log-probs in nats.
    """
    if ref_logp is None:
        raise ValueError("reference= needs ref_logp=, the labels' log-probs under the reference")
    ids, logp, log_tail, temperature, draws = reference
    if not math.isclose(1.0 / temperature, options.scale, rel_tol=1e-6):
        raise ValueError(
            f"the reference's log-probs are of temperature {temperature}, the policy's of {1.0 / options.scale:.6g}: "
            "they must be the same"
        )
    wrong = {"logp": logp.shape != ids.shape, "log_tail": log_tail.shape != shape, "ref_logp": ref_logp.shape != shape}
    if ids.shape[:-1] != shape or not ids.shape[-1] or any(wrong.values()):
        raise ValueError(
            f"reference: ids {tuple(ids.shape)} and logp {tuple(logp.shape)} must be {(*shape, 'k')}, log_tail "
            f"{tuple(log_tail.shape)} and ref_logp {tuple(ref_logp.shape)} must be {tuple(shape)}"
        )
    if draws is not None:
        drawn = (*shape, draws.ids.shape[-1])
        shapes = [tuple(part.shape) for part in draws]
        if shapes != [drawn, drawn, drawn, tuple(shape)]:
            raise ValueError(f"reference.draws {shapes} must be three times {(*shape, 'm')} and {tuple(shape)}")
    check_floats(logp=logp, log_tail=log_tail, ref_logp=ref_logp)
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"reference.ids hold {ids.dtype}, expected token ids")
    kept = (labels != IGNORE_INDEX)[:, None]
    # Ignored rows may hold any numbers. These must not be used as column indices.
    rows = flat_rows(ids.detach()).long().masked_fill(~kept, 0)
    return rows, flat_rows(logp.detach()), log_tail.detach().reshape(-1), ref_logp.detach().reshape(-1)


def loss_weight(weight: Tensor | None, shape: torch.Size, hidden: Tensor) -> Tensor:
    """Return the detached weights (N,) of a loss, and zeros if the weight is None."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if weight is None:
        return torch.zeros(shape.numel(), dtype=dtype, device=hidden.device)
    if weight.shape != shape:
        raise ValueError(f"a weight has shape {tuple(weight.shape)}: must be {tuple(shape)}, one per position")
    return weight.detach().to(dtype).reshape(-1)
