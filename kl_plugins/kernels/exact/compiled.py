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
    IGNORE_INDEX,
    Options,
    RowStatistics,
    different_caps,
    finish,
    label_logits,
    needs_float64,
    row_sums,
    whole_rows,
)

_MOST_HELD = 16
"""Float64 gradients are held for at most one row in so many; with more of them, all are computed tile by tile."""


def forward(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    options: Options,
    *,
    forced: bool = False,
) -> RowStatistics:
    """Statistics of each row; see :func:`kl_plugins.kernels.exact.eager.forward`.

    Args:
        forced: raise where compiling fails, instead of taking the eager path.
    """
    options = _for_rows(options)
    # The compiler would look for the graph that these carry, and compile once more for each kind.
    logits, ref_logits = logits.detach(), ref_logits.detach()
    found = label_logits(logits, ref_logits, labels, options)
    parts = run_compiled(_sums, logits, ref_logits, found.shift, options, forced=forced, instead=eager.eager_sums)
    statistics, doubtful = finish(whole_rows(parts, found), labels, torch.promote_types(logits.dtype, torch.float32))
    return repair(statistics, doubtful, logits, ref_logits, labels, options)


def backward(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    statistics: RowStatistics,
    grad_kl: Tensor,
    grad_logp: Tensor,
    options: Options,
    out: Tensor | None = None,
    *,
    forced: bool = False,
) -> Tensor:
    """Gradient with respect to the policy's logits; see :func:`kl_plugins.kernels.exact.eager.backward`."""
    if out is None:
        out = memory.empty_like(logits)
    options = _for_rows(options)
    # Saved outputs carry their graph too; see above. Where out is the logits, it has to stay the same tensor.
    plain = logits.detach()
    target = plain if out is logits else out.detach()
    ref_logits, grad_kl, grad_logp = (x.detach() for x in (ref_logits, grad_kl, grad_logp))
    found = RowStatistics(*(part.detach() for part in statistics))
    rows = (found, grad_kl, grad_logp, options, target)
    # Before the first row is written: out may be the logits.
    index, at_label = label_gradients(plain, ref_logits, labels, *rows[:-1], out.dtype)
    kept = labels != IGNORE_INDEX
    again = needs_float64(found).nonzero()[:, 0]
    if different_caps(options) or _MOST_HELD * len(again) > len(labels):
        eager.write_gradients(plain, ref_logits, kept, *rows)  # in float64
        return put_label_gradients(out, index, at_label)
    # Before the first row is written, as above.
    precise = precise_gradients(again, plain, ref_logits, kept, *rows[:-1], out.dtype)
    rows = (found._replace(centre=found.centre.to(found.lse.dtype)), *rows[1:])
    run_compiled(_gradients, plain, ref_logits, kept, *rows, forced=forced, instead=eager.write_gradients)
    if len(again):
        out[again] = precise
    return put_label_gradients(out, index, at_label)


def _for_rows(options: Options) -> Options:
    # What does not bear on the rows would only make the compiler compile once more.
    return Options(options.scale, options.softcap, options.ref_softcap)


def _sums(logits: Tensor, ref_logits: Tensor, shift: Tensor, options: Options) -> tuple[Tensor, ...]:
    # On a CPU the compiler adds thousands of terms one after the other: in float32 the small ones are lost, 1e-5 of the
    # sum at 152064 tokens. On a GPU it adds by trees.
    return row_sums(
        logits, ref_logits, shift, options, accumulator=torch.float64 if logits.device.type == "cpu" else None
    )


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
