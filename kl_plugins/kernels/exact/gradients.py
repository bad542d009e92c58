"""The gradient of KL and label log-prob of each row, from the row's statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from kl_plugins.kernels.exact.statistics import IGNORE_INDEX, Options, RowStatistics, log_ratio, scaled


def row_gradients(
    logits: Tensor,
    ref_logits: Tensor,
    kept: Tensor,
    statistics: RowStatistics,
    grad_kl: Tensor,
    grad_logp: Tensor,
    options: Options,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of ``grad_kl kl + grad_logp logp`` with respect to the policy's logits, but for the label's own part.

    dKL/dz = p (z - u - E_p[z - u]) and dlogp/dz = onehot - p, times the derivative of scale and cap. The onehot is
    added by :func:`label_gradients`, which costs nothing there.

    Args:
        logits, ref_logits: (N, V), or any columns of them.
        kept: (N,) bool: False gives exactly 0, whatever the row holds.
        statistics: of these rows.
        grad_kl, grad_logp: (N,) upstream gradients.
        options: for all rows.
        dtype: of the result; what it cannot hold saturates.

    Returns:
        Gradients of the columns given.
    """
    info = torch.finfo(dtype)
    gradient = _gradients(logits, ref_logits, statistics, grad_kl, grad_logp, options)
    # torch.where, not a product: an ignored row may hold NaN.
    return torch.where(kept[:, None], gradient.clamp(info.min, info.max), 0.0).to(dtype)


def precise_gradients(
    rows: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    kept: Tensor,
    statistics: RowStatistics,
    grad_kl: Tensor,
    grad_logp: Tensor,
    options: Options,
    dtype: torch.dtype,
) -> Tensor:
    """:func:`row_gradients` of some rows, by their index (n,), computed in float64."""
    found = RowStatistics(*(part[rows].double() for part in statistics))
    logits, ref_logits, kept = logits[rows], ref_logits[rows], kept[rows]
    return row_gradients(logits, ref_logits, kept, found, grad_kl[rows], grad_logp[rows], options, dtype)


def label_gradients(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    statistics: RowStatistics,
    grad_kl: Tensor,
    grad_logp: Tensor,
    options: Options,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The label's column of the gradient, whole; one number a row, so always in float64.

    Returns:
        (N, 1) its index, and (N, 1) the gradient there; 0 in ignored rows.
    """
    index, kept = labels.clamp_min(0)[:, None], (labels != IGNORE_INDEX)[:, None]
    statistics = RowStatistics(*(part.double() for part in statistics))
    one, other = logits.gather(-1, index), ref_logits.gather(-1, index)
    gradient = _gradients(one, other, statistics, grad_kl, grad_logp, options, grad_logp[:, None])
    info = torch.finfo(dtype)
    return index, torch.where(kept, gradient.clamp(info.min, info.max), 0.0).to(dtype)


def put_label_gradients(out: Tensor, index: Tensor, gradient: Tensor) -> Tensor:
    """Write what :func:`label_gradients` returned into a gradient (N, V), and return that."""
    # Not scatter_: on a CPU it walks through all of a 16-bit tensor.
    out[torch.arange(len(index), device=index.device), index[:, 0]] = gradient[:, 0]
    return out


def _gradients(
    logits: Tensor,
    ref_logits: Tensor,
    statistics: RowStatistics,
    grad_kl: Tensor,
    grad_logp: Tensor,
    options: Options,
    onehot: Tensor | None = None,
) -> Tensor:
    dtype, scale, softcap = statistics.lse.dtype, options.scale, options.softcap
    logits, ref_logits = logits.to(dtype), ref_logits.to(dtype)
    ratio = log_ratio(logits, ref_logits, options) - statistics.centre[:, None].to(dtype)
    # p <= 1 whatever lse was rounded to, and wherever z overflows.
    p = torch.exp((scaled(logits, scale, softcap) - statistics.lse[:, None]).clamp(max=0.0))
    gradient = p * (grad_kl.to(dtype)[:, None] * ratio - grad_logp.to(dtype)[:, None])
    if onehot is not None:
        gradient = gradient + onehot.to(dtype)
    if softcap is not None:
        gradient = gradient * (1 - torch.tanh(logits / softcap).square())
    return gradient if scale == 1.0 else gradient * scale
