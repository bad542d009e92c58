"""The gradients of each row's KL and label log-prob, computed from the row's statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from kl_plugins.kernels.exact.statistics import (
    IGNORE_INDEX,
    Options,
    Rows,
    RowStatistics,
    Upstream,
    log_ratio,
    scaled,
)


def row_gradients(
    rows: Rows, statistics: RowStatistics, upstream: Upstream, options: Options, dtype: torch.dtype
) -> Tensor:
    """Compute the gradient of ``upstream.kl kl + upstream.logp logp`` for the policy's logits, without the onehot.

    dKL/dz = p (z - u - E_p[z - u]) and dlogp/dz = onehot - p, times the derivative of scale and cap. The onehot is
    added by :func:`label_gradients`, where it costs nothing.

    Args:
        rows: whole rows, or any columns of them. Labels are read only to find ignored rows: the gradient of those is
            exactly 0, even if they hold NaN.
        statistics: statistics of these rows.
        upstream: upstream gradients of KL and label log-prob.
        options: options for all rows.
        dtype: dtype of the result; values outside its range are clamped to it.

    Returns:
        Gradients of the given columns.
    """
    info = torch.finfo(dtype)
    gradient = _gradients(rows.logits, rows.ref_logits, statistics, upstream, options)
    kept = rows.labels != IGNORE_INDEX
    # torch.where, not a product: an ignored row may hold NaN.
    return torch.where(kept[:, None], gradient.clamp(info.min, info.max), 0.0).to(dtype)


def precise_gradients(
    index: Tensor, rows: Rows, statistics: RowStatistics, upstream: Upstream, options: Options, dtype: torch.dtype
) -> Tensor:
    """Compute :func:`row_gradients` of the rows with the given index (n,) in float64."""
    return row_gradients(rows.at(index), statistics.at(index).double(), upstream.at(index), options, dtype)


def label_gradients(
    rows: Rows, statistics: RowStatistics, upstream: Upstream, options: Options, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute the label's column of the gradient, with the onehot. It is one number per row, so always in float64.

    Returns:
        (N, 1) index of the column, and (N, 1) gradient there; 0 in ignored rows.
    """
    index, kept = rows.labels.clamp_min(0)[:, None], (rows.labels != IGNORE_INDEX)[:, None]
    one, other = rows.logits.gather(-1, index), rows.ref_logits.gather(-1, index)
    gradient = _gradients(one, other, statistics.double(), upstream, options, upstream.logp[:, None])
    info = torch.finfo(dtype)
    return index, torch.where(kept, gradient.clamp(info.min, info.max), 0.0).to(dtype)


def put_label_gradients(out: Tensor, index: Tensor, gradient: Tensor) -> Tensor:
    """Write the result of :func:`label_gradients` into a gradient (N, V), and return the gradient."""
    # scatter_ is not used: on a CPU it reads and writes the whole of a 16-bit tensor.
    out[torch.arange(len(index), device=index.device), index[:, 0]] = gradient[:, 0]
    return out


def _gradients(
    logits: Tensor,
    ref_logits: Tensor,
    statistics: RowStatistics,
    upstream: Upstream,
    options: Options,
    onehot: Tensor | None = None,
) -> Tensor:
    dtype, scale, softcap = statistics.lse.dtype, options.scale, options.softcap
    logits, ref_logits = logits.to(dtype), ref_logits.to(dtype)
    ratio = log_ratio(logits, ref_logits, options) - statistics.centre[:, None].to(dtype)
    # The clamp keeps p <= 1, even if lse was rounded down or z overflows.
    p = torch.exp((scaled(logits, scale, softcap) - statistics.lse[:, None]).clamp(max=0.0))
    gradient = p * (upstream.kl.to(dtype)[:, None] * ratio - upstream.logp.to(dtype)[:, None])
    if onehot is not None:
        gradient = gradient + onehot.to(dtype)
    if softcap is not None:
        gradient = gradient * (1 - torch.tanh(logits / softcap).square())
    return gradient if scale == 1.0 else gradient * scale
