"""The backend of ``torch.compile``: one fused loop per row and direction, on CPU and GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kl_plugins.kernels.backend import run_compiled
from kl_plugins.kernels.exact import eager
from kl_plugins.kernels.exact.precise import repair
from kl_plugins.kernels.exact.statistics import RowStatistics, RowSums, finish, row_gradients, row_sums


def forward(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    *,
    scale: float,
    softcap: float | None,
    ref_softcap: float | None,
    forced: bool = False,
) -> RowStatistics:
    """Statistics of each row; see :func:`kl_plugins.kernels.exact.eager.forward`.

    Args:
        forced: raise where compiling fails, instead of taking the eager path.
    """
    options = (scale, softcap, ref_softcap)
    sums: RowSums = run_compiled(_sums, logits, ref_logits, labels, *options, forced=forced, instead=eager.sums)
    statistics, doubtful = finish(sums, labels)
    return repair(
        statistics, doubtful, logits, ref_logits, labels, scale=scale, softcap=softcap, ref_softcap=ref_softcap
    )


def backward(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    statistics: RowStatistics,
    grad_kl: Tensor,
    grad_logp: Tensor,
    *,
    scale: float,
    softcap: float | None,
    ref_softcap: float | None,
    out: Tensor | None = None,
    forced: bool = False,
) -> Tensor:
    """Gradient with respect to the policy's logits; see :func:`kl_plugins.kernels.exact.eager.backward`."""
    if out is None:
        out = torch.empty_like(logits)
    rows = (logits, ref_logits, labels, statistics, grad_kl, grad_logp, scale, softcap, ref_softcap, out)
    run_compiled(_gradients, *rows, forced=forced, instead=eager.write_gradients)
    return out


def _sums(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    scale: float,
    softcap: float | None,
    ref_softcap: float | None,
) -> RowSums:
    return row_sums(logits, ref_logits, labels, scale, softcap, ref_softcap)


def _gradients(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    statistics: RowStatistics,
    grad_kl: Tensor,
    grad_logp: Tensor,
    scale: float,
    softcap: float | None,
    ref_softcap: float | None,
    out: Tensor,
) -> None:
    out.copy_(
        row_gradients(
            logits, ref_logits, labels, statistics, grad_kl, grad_logp, scale, softcap, ref_softcap, out.dtype
        )
    )
