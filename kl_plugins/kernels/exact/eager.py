"""The reference backend: plain torch operations, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kl_plugins.kernels import memory
from kl_plugins.kernels.exact.gradients import (
    label_gradients,
    precise_gradients,
    put_label_gradients,
    row_gradients,
)
from kl_plugins.kernels.exact.precise import repair
from kl_plugins.kernels.exact.statistics import (
    Options,
    Rows,
    RowStatistics,
    Upstream,
    different_caps,
    finish,
    label_logits,
    needs_float64,
    row_sums,
    whole_rows,
)

TILE_BYTES = 16 * 2**20
"""Default bound on the temporaries of a call, in bytes: about the size of a CPU's caches."""

_TEMPORARIES = 8


def tiles(logits: Tensor, tile_bytes: int, dtype: torch.dtype) -> Iterator[slice]:
    """Yield slices of rows whose temporaries in the given dtype fit ``tile_bytes``, with at least one row each."""
    step = max(1, tile_bytes // (_TEMPORARIES * dtype.itemsize * max(1, logits.shape[-1])))
    for start in range(0, logits.shape[0], step):
        yield slice(start, start + step)


def forward(rows: Rows, options: Options) -> RowStatistics:
    """Compute the statistics of each row.

    Args:
        rows: logits of policy and reference, and labels.
        options: options for all rows. The temporaries of at least one row are allocated, even if they exceed
            ``tile_bytes``.

    Returns:
        Statistics, (N,) each.
    """
    tile_bytes = options.tile_bytes or TILE_BYTES
    found = label_logits(rows, options)
    sums = whole_rows(eager_sums(rows.logits, rows.ref_logits, found.shift, options, tile_bytes), found)
    statistics, doubtful = finish(sums, rows.labels, torch.promote_types(rows.logits.dtype, torch.float32))
    return repair(statistics, doubtful, rows, options, tile_bytes)


def backward(
    rows: Rows, statistics: RowStatistics, upstream: Upstream, options: Options, out: Tensor | None = None
) -> Tensor:
    """Compute the gradient with respect to the policy's logits.

    Args:
        rows, options: the arguments of :func:`forward`.
        statistics: the result of :func:`forward`.
        upstream: upstream gradients of KL and label log-prob.
        out: (N, V) tensor to write into, of any float dtype; ``rows.logits`` itself is allowed. The default is a new
            tensor like ``rows.logits``.

    Returns:
        (N, V): ``out``, or a tensor in the dtype of ``logits``.
    """
    if out is None:
        out = memory.empty_like(rows.logits)
    # The label's column is computed before the first row is written, because out may be the logits.
    index, at_label = label_gradients(rows, statistics, upstream, options, out.dtype)
    write_gradients(rows, statistics, upstream, options, out, options.tile_bytes or TILE_BYTES)
    return put_label_gradients(out, index, at_label)


def eager_sums(
    logits: Tensor, ref_logits: Tensor, shift: Tensor, options: Options, tile_bytes: int = TILE_BYTES
) -> tuple[Tensor, ...]:
    """Compute :func:`~kl_plugins.kernels.exact.statistics.row_sums` tile by tile."""
    slices = tiles(logits, tile_bytes, shift.dtype)
    parts = [row_sums(logits[rows], ref_logits[rows], shift[rows], options) for rows in slices]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True)) if parts else (shift,) * 6


def write_gradients(
    rows: Rows,
    statistics: RowStatistics,
    upstream: Upstream,
    options: Options,
    out: Tensor,
    tile_bytes: int = TILE_BYTES,
) -> None:
    """Write :func:`~kl_plugins.kernels.exact.gradients.row_gradients` into ``out``, tile by tile."""
    if different_caps(options):
        statistics = statistics.double()
    chosen = needs_float64(statistics)
    for part in tiles(rows.logits, tile_bytes, torch.float64 if chosen.any() else statistics.lse.dtype):
        given = (rows.at(part), statistics.at(part), upstream.at(part), options, out.dtype)
        gradient = row_gradients(*given)
        again = chosen[part].nonzero()[:, 0]
        if len(again):
            gradient[again] = precise_gradients(again, *given)
        out[part] = gradient
