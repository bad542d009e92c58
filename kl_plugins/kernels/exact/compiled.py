"""The backend of ``torch.compile``: one fused loop per row and direction, on CPU and GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from kl_plugins.kernels import memory
from kl_plugins.kernels.backend import run_compiled
from kl_plugins.kernels.exact import eager
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

_MOST_HELD = 16
"""Largest share of rows with float64 gradients that are held at once: one in 16.

If more rows need float64, the gradients of all rows are computed tile by tile.
"""


def forward(rows: Rows, options: Options, *, forced: bool = False) -> RowStatistics:
    """Compute the statistics of each row; see :func:`kl_plugins.kernels.exact.eager.forward`.

    Args:
        forced: whether to raise if compiling fails, instead of using the eager path.
    """
    options = _for_rows(options)
    # With tensors that carry an autograd graph, the compiler would compile once more for each combination of them.
    rows = Rows(*(part.detach() for part in rows))
    found = label_logits(rows, options)
    logits = (rows.logits, rows.ref_logits)
    parts = run_compiled(_sums, *logits, found.shift, options, forced=forced, instead=eager.eager_sums)
    statistics, doubtful = finish(
        whole_rows(parts, found), rows.labels, torch.promote_types(rows.logits.dtype, torch.float32)
    )
    return repair(statistics, doubtful, rows, options)


def backward(
    rows: Rows,
    statistics: RowStatistics,
    upstream: Upstream,
    options: Options,
    out: Tensor | None = None,
    *,
    forced: bool = False,
) -> Tensor:
    """Compute the gradient for the policy's logits; see :func:`kl_plugins.kernels.exact.eager.backward`."""
    if out is None:
        out = memory.empty_like(rows.logits)
    options = _for_rows(options)
    # Saved outputs carry an autograd graph too, as in forward. If out is the logits, it must stay the same tensor.
    plain = Rows(*(part.detach() for part in rows))
    target = plain.logits if out is rows.logits else out.detach()
    upstream = Upstream(*(part.detach() for part in upstream))
    statistics = RowStatistics(*(part.detach() for part in statistics))
    # The label's column is computed before the first row is written, because out may be the logits.
    index, at_label = label_gradients(plain, statistics, upstream, options, out.dtype)
    again = needs_float64(statistics).nonzero()[:, 0]
    if different_caps(options) or _MOST_HELD * len(again) > len(plain.labels):
        eager.write_gradients(plain, statistics, upstream, options, target)  # in float64
        return put_label_gradients(out, index, at_label)
    # These rows too are computed before the first row is written.
    precise = precise_gradients(again, plain, statistics, upstream, options, out.dtype)
    single = statistics._replace(centre=statistics.centre.to(statistics.lse.dtype))
    given = (plain, single, upstream, options, target)
    run_compiled(_gradients, *given, forced=forced, instead=eager.write_gradients)
    if len(again):
        out[again] = precise
    return put_label_gradients(out, index, at_label)


def _for_rows(options: Options) -> Options:
    # Options that do not change the arithmetic are removed. The compiler would compile again for each of their values.
    return Options(options.scale, options.softcap, options.ref_softcap)


def _sums(logits: Tensor, ref_logits: Tensor, shift: Tensor, options: Options) -> tuple[Tensor, ...]:
    # On a CPU the compiler adds thousands of terms one after the other. In float32 the small terms are then lost:
    # 1e-5 of the sum at 152064 tokens. On a GPU the compiler adds in a tree, which keeps them.
    return row_sums(
        logits, ref_logits, shift, options, accumulator=torch.float64 if logits.device.type == "cpu" else None
    )


def _gradients(rows: Rows, statistics: RowStatistics, upstream: Upstream, options: Options, out: Tensor) -> None:
    out.copy_(row_gradients(rows, statistics, upstream, options, out.dtype))
