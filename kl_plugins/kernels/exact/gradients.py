"""The gradient of KL and label log-prob of each row, from the row's statistics."""

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
    """Gradient of ``upstream.kl kl + upstream.logp logp`` by the policy's logits, but for the label's own part.

    dKL/dz = p (z - u - E_p[z - u]) and dlogp/dz = onehot - p, times the derivative of scale and cap. The onehot is
    added by :func:`label_gradients`, which costs nothing there.

    Args:
        rows: whole, or any columns of them. Labels are read only for rows to leave out: those give exactly 0, whatever
            they hold.
        statistics: of these rows.
        upstream: gradients.
        options: for all rows.
        dtype: of the result; what it cannot hold saturates.

    Returns:
        Gradients of the columns given.
    """
    info = torch.finfo(dtype)
    gradient = _gradients(rows.logits, rows.ref_logits, statistics, upstream, options)
    kept = rows.labels != IGNORE_INDEX
    # torch.where, not a product: an ignored row may hold NaN.
    return torch.where(kept[:, None], gradient.clamp(info.min, info.max), 0.0).to(dtype)


def precise_gradients(
    index: Tensor, rows: Rows, statistics: RowStatistics, upstream: Upstream, options: Options, dtype: torch.dtype
) -> Tensor:
    """:func:`row_gradients` of some rows, by their index (n,), computed in float64."""
    return row_gradients(rows.at(index), statistics.at(index).double(), upstream.at(index), options, dtype)


def label_gradients(
    rows: Rows, statistics: RowStatistics, upstream: Upstream, options: Options, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The label's column of the gradient, whole; one number a row, so always in float64.

    Returns:
        (N, 1) its index, and (N, 1) the gradient there; 0 in ignored rows.
    """
    index, kept = rows.labels.clamp_min(0)[:, None], (rows.labels != IGNORE_INDEX)[:, None]
    one, other = rows.logits.gather(-1, index), rows.ref_logits.gather(-1, index)
    gradient = _gradients(one, other, statistics.double(), upstream, options, upstream.logp[:, None])
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
    upstream: Upstream,
    options: Options,
    onehot: Tensor | None = None,
) -> Tensor:
    dtype, scale, softcap = statistics.lse.dtype, options.scale, options.softcap
    logits, ref_logits = logits.to(dtype), ref_logits.to(dtype)
    ratio = log_ratio(logits, ref_logits, options) - statistics.centre[:, None].to(dtype)
    # p <= 1 whatever lse was rounded to, and wherever z overflows.
    p = torch.exp((scaled(logits, scale, softcap) - statistics.lse[:, None]).clamp(max=0.0))
    gradient = p * (upstream.kl.to(dtype)[:, None] * ratio - upstream.logp.to(dtype)[:, None])
    if onehot is not None:
        gradient = gradient + onehot.to(dtype)
    if softcap is not None:
        gradient = gradient * (1 - torch.tanh(logits / softcap).square())
    return gradient if scale == 1.0 else gradient * scale
