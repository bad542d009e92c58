"""The backend of ``torch.compile``: one fused loop per row and direction, on CPU and GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kl_plugins.kernels.backend import run_compiled
from kl_plugins.kernels.exact import eager
from kl_plugins.kernels.exact.precise import repair
from kl_plugins.kernels.exact.statistics import (
    IGNORE_INDEX,
    Options,
    RowStatistics,
    finish,
    label_gradients,
    label_logits,
    row_gradients,
    row_sums,
    whole_rows,
)


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
    options = Options(scale, softcap, ref_softcap)
    # The compiler would look for the graph that these carry, and compile once more for each kind.
    logits, ref_logits = logits.detach(), ref_logits.detach()
    found = label_logits(logits, ref_logits, labels, options)
    parts = run_compiled(_sums, logits, ref_logits, found.shift, options, forced=forced, instead=eager.eager_sums)
    statistics, doubtful = finish(whole_rows(parts, found), labels)
    return repair(statistics, doubtful, logits, ref_logits, labels, options)


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
    options = Options(scale, softcap, ref_softcap)
    rows = (statistics, grad_kl, grad_logp, options, out)
    # Before the first row is written: out may be the logits.
    index, at_label = label_gradients(logits, ref_logits, labels, *rows[:-1], out.dtype)
    kept = labels != IGNORE_INDEX
    run_compiled(_gradients, logits, ref_logits, kept, *rows, forced=forced, instead=eager.write_gradients)
    return out.scatter_(-1, index, at_label)


def _sums(logits: Tensor, ref_logits: Tensor, shift: Tensor, options: Options) -> tuple[Tensor, ...]:
    return row_sums(logits, ref_logits, shift, options)


def _gradients(
    logits: Tensor,
    ref_logits: Tensor,
    kept: Tensor,
    statistics: RowStatistics,
    grad_kl: Tensor,
    grad_logp: Tensor,
    options: Options,
    out: Tensor,
) -> None:
    out.copy_(row_gradients(logits, ref_logits, kept, statistics, grad_kl, grad_logp, options, out.dtype))
