"""The reference backend: plain torch operations, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kl_plugins.kernels.exact.precise import repair
from kl_plugins.kernels.exact.statistics import RowStatistics, RowSums, finish, row_gradients, row_sums

TILE_BYTES = 16 * 2**20
"""Default bound on what a call holds beside its arguments and results: about what a CPU's caches hold."""

_TEMPORARIES = 8


def tiles(logits: Tensor, tile_bytes: int) -> Iterator[slice]:
    """Slices of rows whose temporaries fit ``tile_bytes``, at least one row each."""
    size = 8 if logits.dtype == torch.float64 else 4
    step = max(1, tile_bytes // (_TEMPORARIES * size * max(1, logits.shape[-1])))
    for start in range(0, logits.shape[0], step):
        yield slice(start, start + step)


def forward(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    *,
    scale: float,
    softcap: float | None,
    ref_softcap: float | None,
    tile_bytes: int = TILE_BYTES,
) -> RowStatistics:
    """Statistics of each row.

    Args:
        logits, ref_logits: (N, V), any float dtype; policy and reference.
        labels: (N,) int64, :data:`~kl_plugins.kernels.exact.statistics.IGNORE_INDEX` where a row is left out.
        scale: 1 / temperature.
        softcap, ref_softcap: the models' final logit soft-caps, None for none.
        tile_bytes: bound on the temporaries; at least one row's are needed.

    Returns:
        Statistics, (N,) each.
    """
    found = sums(logits, ref_logits, labels, scale, softcap, ref_softcap, tile_bytes)
    statistics, doubtful = finish(found, labels)
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
    tile_bytes: int = TILE_BYTES,
) -> Tensor:
    """Gradient with respect to the policy's logits.

    Args:
        logits, ref_logits, labels, scale, softcap, ref_softcap: as given to :func:`forward`.
        statistics: what it returned.
        grad_kl, grad_logp: (N,) upstream gradients.
        out: (N, V) to write into, of any float dtype; ``logits`` itself is allowed. Default: a new tensor like it.
        tile_bytes: bound on the temporaries; at least one row's are needed.

    Returns:
        (N, V): ``out``, or a tensor in the dtype of ``logits``.
    """
    if out is None:
        out = torch.empty_like(logits)
    write_gradients(
        logits,
        ref_logits,
        labels,
        statistics,
        grad_kl,
        grad_logp,
        scale,
        softcap,
        ref_softcap,
        out,
        tile_bytes,
    )
    return out


def sums(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    scale: float,
    softcap: float | None,
    ref_softcap: float | None,
    tile_bytes: int = TILE_BYTES,
) -> RowSums:
    """:func:`~kl_plugins.kernels.exact.statistics.row_sums`, tile by tile."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    result = RowSums(*torch.zeros(len(RowSums._fields), logits.shape[0], dtype=dtype, device=logits.device))
    for rows in tiles(logits, tile_bytes):
        found = row_sums(logits[rows], ref_logits[rows], labels[rows], scale, softcap, ref_softcap)
        for target, source in zip(result, found, strict=True):
            target[rows] = source
    return result


def write_gradients(
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
    tile_bytes: int = TILE_BYTES,
) -> None:
    """:func:`~kl_plugins.kernels.exact.statistics.row_gradients`, tile by tile, into ``out``."""
    for rows in tiles(logits, tile_bytes):
        out[rows] = row_gradients(
            logits[rows],
            ref_logits[rows],
            labels[rows],
            RowStatistics(*(part[rows] for part in statistics)),
            grad_kl[rows],
            grad_logp[rows],
            scale,
            softcap,
            ref_softcap,
            out.dtype,
        )
