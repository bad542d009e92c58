"""Exact KL of logits whose vocabulary is split over the ranks of a tensor-parallel group.

The sums of :mod:`kl_plugins.kernels.exact.statistics` add up over parts of a row that share shift and maximum. So a
forward pass costs two all-reduces. A MAX all-reduce takes four numbers per row: the largest logits of policy and
reference, and the label's two logits, which one rank knows. A SUM all-reduce takes five numbers per row: mass, first,
second, reference mass, and the number of ranks that hold the label. The backward pass needs no communication, because a
logit's gradient depends only on its own shard and the row's statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kl_plugins.kernels.exact import eager
from kl_plugins.kernels.exact.autograd import BackwardPass, for_each_argument, named
from kl_plugins.kernels.exact.backends import backend_for
from kl_plugins.kernels.exact.gradients import label_gradients
from kl_plugins.kernels.exact.statistics import (
    IGNORE_INDEX,
    LabelLogits,
    Options,
    Rows,
    RowStatistics,
    RowSums,
    Upstream,
    finish,
    log_ratio,
    row_sums,
    scaled,
    times,
    working_dtype,
)


class Shard(NamedTuple):
    """The part of the vocabulary that a rank holds.

    Attributes:
        start: token id of the first column.
        group: process group of the ranks that hold the vocabulary together; None for the default group of all ranks.
    """

    start: int
    group: dist.ProcessGroup | None


class ShardedLogitsKL(torch.autograd.Function):
    """(*Rows, shard, options) -> RowStatistics; the result is the same on every rank."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        """Compute the statistics of rows (N, columns of this rank). Labels are tokens of the whole vocabulary."""
        rows, shard, options = named(args, Rows)
        with torch.autocast(rows.logits.device.type, enabled=False):
            return tuple(_statistics(rows, shard, options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save this rank's logits and five numbers per row."""
        *rows, ctx.shard, ctx.options = inputs
        ctx.save_for_backward(*rows, *output)
        ctx.mark_non_differentiable(*output[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradient of this rank's logits. Upstream gradients must be the same on every rank."""
        given = RowStatistics(*grads)
        upstream = Upstream(given.kl, given.logp)
        return for_each_argument(ctx, sharded_gradient(*ctx.saved_tensors, *upstream, ctx.shard, ctx.options))


class ShardedGradient(BackwardPass):
    """The backward pass of :class:`ShardedLogitsKL`: (*Rows, *RowStatistics, *Upstream, shard, options) -> gradient."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        """Compute the gradient (N, columns of this rank)."""
        rows, statistics, upstream, shard, options = named(args, Rows, RowStatistics, Upstream)
        with torch.autocast(rows.logits.device.type, enabled=False):
            return _gradient(rows, statistics, upstream, shard, options)


sharded_logits_kl: Callable[..., tuple[Tensor, ...]] = ShardedLogitsKL.apply
"""Apply :class:`ShardedLogitsKL`."""

sharded_gradient: Callable[..., Tensor] = ShardedGradient.apply
"""Apply :class:`ShardedGradient`."""


def _statistics(rows: Rows, shard: Shard, options: Options) -> RowStatistics:
    logits, ref_logits, labels = rows
    kept, (owned, local) = labels != IGNORE_INDEX, _ownership(rows, shard)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # The raw logits are reduced. Cap and temperature are monotonic, and z - u must be taken before they round.
    raw = [
        *(x.amax(-1).to(dtype) for x in (logits, ref_logits)),
        *(_at(x, local).to(dtype).masked_fill(~owned, -torch.inf) for x in (logits, ref_logits)),
    ]
    highest = torch.stack(raw)  # Ignored rows are included: rows are independent, and finish sets ignored rows to 0.
    dist.all_reduce(highest, dist.ReduceOp.MAX, shard.group)
    # The maxima are rounded as the rows are: all ranks must subtract the same number from their logits.
    working = working_dtype(logits, options)
    top, ref_top = (
        scaled(highest[i].to(working), 1.0, cap) for i, cap in enumerate((options.softcap, options.ref_softcap))
    )
    label, ref_label = highest[2:].double()
    at_label = LabelLogits(
        scaled(label, options.scale, options.softcap),
        scaled(ref_label, options.scale, options.ref_softcap),
        log_ratio(label, ref_label, options).to(working),
    )

    if backend_for(logits, options).name == "triton":
        parts, shift = _triton_sums(rows, at_label, top, ref_top, options)
    else:
        parts, shift = _eager_sums(rows, at_label.shift, top, ref_top, options)
    total = torch.stack([*parts, owned.to(parts[0].dtype)])
    dist.all_reduce(total, dist.ReduceOp.SUM, shard.group)
    mass, first, second, ref_mass, owners = total
    _check_owners(owners, kept)
    ref_lse = ref_top.double() * options.scale + ref_mass.double().log() + shift.double()
    maximum = top.double() * options.scale
    sums = RowSums(maximum, mass, first, second, ref_mass, shift, at_label.label, at_label.ref_label)
    return finish(sums, labels, dtype, ref_lse)[0]


def _eager_sums(
    rows: Rows, shift: Tensor, top: Tensor, ref_top: Tensor, options: Options
) -> tuple[list[Tensor], Tensor]:
    """Compute mass, first, second and reference mass of this rank's columns, and the shift that was subtracted."""
    parts = []
    for index in eager.tiles(rows.logits, options.tile_bytes or eager.TILE_BYTES, shift.dtype):
        part, ref_part = rows.logits[index], rows.ref_logits[index]
        _, mass, first, second, _, used = row_sums(part, ref_part, shift[index], options, top[index])
        # The reference mass is taken around the reference's own maximum, so that it cannot overflow.
        u = scaled(ref_part.to(shift.dtype), 1.0, options.ref_softcap)
        ref_mass = torch.exp(times(u - ref_top[index, None], options.scale)).sum(-1)
        parts.append(torch.stack([mass, first, second, ref_mass, used]))
    *sums, shift = torch.cat(parts, dim=-1) if parts else [shift] * 5
    return sums, shift


def _triton_sums(
    rows: Rows, at_label: LabelLogits, top: Tensor, ref_top: Tensor, options: Options
) -> tuple[list[Tensor], Tensor]:
    from kl_plugins.kernels.exact import triton_backend

    found = triton_backend.part_sums(rows, at_label, options)
    factor = torch.exp((found.maximum - top) * options.scale).float()
    ref_factor = torch.exp((found.ref_maximum - ref_top) * options.scale).float()
    sums = [*(part * factor for part in (found.mass, found.first, found.second)), found.ref_mass * ref_factor]
    return sums, found.shift


def _gradient(rows: Rows, statistics: RowStatistics, upstream: Upstream, shard: Shard, options: Options) -> Tensor:
    owned, local = _ownership(rows, shard)
    if backend_for(rows.logits, options).name == "triton":
        from kl_plugins.kernels.exact import triton_backend

        # Rows whose label is in another shard get a column that does not exist, so that no onehot is added.
        elsewhere = torch.where(rows.labels != IGNORE_INDEX, rows.logits.shape[-1], IGNORE_INDEX)
        here = rows._replace(labels=torch.where(owned, local, elsewhere))
        return triton_backend.backward(here, statistics, upstream, options)
    out = torch.empty_like(rows.logits)
    eager.write_gradients(rows, statistics, upstream, options, out, options.tile_bytes or eager.TILE_BYTES)
    here = rows._replace(labels=torch.where(owned, local, IGNORE_INDEX))
    index, at_label = label_gradients(here, statistics, upstream, options, out.dtype)
    return out.scatter_(-1, index, torch.where(owned[:, None], at_label, out.gather(-1, index)))


def _ownership(rows: Rows, shard: Shard) -> tuple[Tensor, Tensor]:
    """Return which rows have their label in this shard, and the label's column there (column 0 in the other rows)."""
    local = rows.labels - shard.start
    owned = (local >= 0) & (local < rows.logits.shape[-1]) & (rows.labels != IGNORE_INDEX)
    return owned, local.masked_fill(~owned, 0)


def _at(logits: Tensor, index: Tensor) -> Tensor:
    return logits.gather(-1, index[:, None])[:, 0]


def _check_owners(owners: Tensor, kept: Tensor) -> None:
    # The sums are the same on every rank, so either all ranks raise or none does.
    message = (
        "a label is held by no rank or by several: check vocab_start, and that labels are tokens of the vocabulary"
    )
    right = ((owners == 1) | ~kept).all()
    if owners.device.type == "cpu":
        if not right:
            raise ValueError(message)
    else:
        torch._assert_async(right, f"kl-plugins: {message}")
