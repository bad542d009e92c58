"""Exact KL from hidden states and the output head: logits exist a tile at a time.

Two modes. With autograd, tiles are computed again in the backward pass, for any upstream gradient. With weights known
up front the gradient is computed in the forward pass, while the tile is there, and nothing is computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from kl_plugins.kernels import memory
from kl_plugins.kernels.exact.backends import backend_for
from kl_plugins.kernels.exact.bucket import (
    TopKReference,
    TopKRows,
    TopKStatistics,
    top_k_gradients,
    top_k_statistics,
)
from kl_plugins.kernels.exact.products import Head
from kl_plugins.kernels.exact.statistics import IGNORE_INDEX, Options, Rows, RowStatistics, Upstream

CPU_TILE_BYTES = 128 * 2**20
ACCELERATOR_TILE_BYTES = 1300 * 2**20
CPU_ROWS = 128
"""A CPU's matrix products are slower with fewer rows than this, and each tile reads and writes the head's gradient."""

ROW_MULTIPLE = 128
"""An accelerator's matrix products work on so many rows at once; a tile with a few more pays for as many again."""

GROUP = 4
"""Tiles whose 16-bit gradients wait for one product with the hidden states. Each of those products reads and writes the
head's float32 gradient, 2 x 2.2 GB for a head of 152064 x 3584: of 512 rows that takes longer than the arithmetic."""

_LOGITS_SHARE, _MIXED_LOGITS_SHARE = 3 / 4, 15 / 16


def default_tile_bytes(hidden: Tensor, vocabulary: int) -> int:
    """Bound on temporaries where the caller sets none: small enough for caches, large enough for the products."""
    if hidden.device.type != "cpu":
        return ACCELERATOR_TILE_BYTES
    both_logits = 2 * torch.promote_types(hidden.dtype, torch.float32).itemsize * (vocabulary + 2 * hidden.shape[-1])
    return max(CPU_TILE_BYTES, math.ceil(CPU_ROWS * both_logits / _LOGITS_SHARE))


class Wanted(NamedTuple):
    """Which gradients to compute."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """Gradients of hidden states (N, D), the head's weight (V, D) and its bias (V,); None if not requested."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Tile(NamedTuple):
    """Logits of some rows, in buffers that the next tile will overwrite.

    Attributes:
        chosen: which rows of the arguments these are.
        hidden: (n, D) their hidden states.
        rows: their logits and labels.
    """

    chosen: Tensor | slice
    hidden: Tensor
    rows: Rows | TopKRows


class Plan(NamedTuple):
    """How rows are cut into tiles.

    Attributes:
        kept: numbers of the rows that count.
        whole: whether these are all rows.
        step: rows per tile.
        group: tiles whose gradients are held for one product.
    """

    kept: Tensor
    whole: bool
    step: int
    group: int

    def rows(self, start: int, stop: int) -> Tensor | slice:
        """What selects some of the kept rows, by their order."""
        return slice(start, stop) if self.whole else self.kept[start:stop]


def step_of(count: int, most: int, multiple: int) -> int:
    """Rows per tile: tiles of one size, as a narrow last one would waste a pass over the weight.

    Args:
        count: rows in all.
        most: rows that memory holds.
        multiple: what the device's products take at once.
    """
    most = max(1, most)
    if most > multiple:
        most -= most % multiple
    step = -(-count // max(1, -(-count // most)))
    return min(most, -(-step // multiple) * multiple) if step > multiple else max(1, step)


Heads: TypeAlias = "tuple[Head, Head | None]"
"""The policy's, and the reference's where it has one here."""


class LinearInputs(NamedTuple):
    """The policy's head and what goes through it, and the reference's; ignored rows are never computed.

    The reference is a head of its own, or what is known of its distribution in each row.

    Attributes:
        hidden, weight, bias: (N, D), (V, D), and (V,) or None.
        ref_hidden, ref_weight, ref_bias: (N, D'), (V, D'), and (V,) or None; all None where ``top_k`` is given.
        labels: (N,) int64.
        top_k: the reference of each row, or None.
        options: for the rows.
        operands: dtypes that the two products read, from :func:`~kl_plugins.kernels.exact.products.operand_dtype`.
        tile_bytes: bound on everything that is neither argument, result nor the weight's gradient.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_bias: Tensor | None
    labels: Tensor
    top_k: TopKReference | None
    options: Options
    operands: tuple[torch.dtype, torch.dtype]
    tile_bytes: int

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields that hold tensors."""
        policy, reference = (self.hidden, self.weight, self.bias), (self.ref_hidden, self.ref_weight, self.ref_bias)
        return *policy, *reference, self.labels

    def settings(self) -> tuple[Any, ...]:
        """The other fields."""
        return self.top_k, self.options, self.operands, self.tile_bytes

    def kind(self) -> type[RowStatistics | TopKStatistics]:
        """What the statistics of the rows are."""
        return RowStatistics if self.top_k is None else TopKStatistics

    def heads(self) -> Heads:
        """Policy's and reference's."""
        block = self.tile_bytes // 8
        policy = Head(self.weight, self.bias, self.operands[0], block)
        if self.ref_weight is None:
            return policy, None
        return policy, Head(self.ref_weight, self.ref_bias, self.operands[1], block)

    def plan(self, heads: Heads, *, grouped: bool) -> Plan:
        """How the rows that count are cut into tiles.

        Args:
            heads: from :meth:`heads`.
            grouped: whether :data:`GROUP` tiles of 16-bit gradients are held, for a wanted gradient of the weight.
        """
        head, ref_head = heads
        kept = (self.labels != IGNORE_INDEX).nonzero()[:, 0]
        count, vocabulary = len(kept), self.weight.shape[0]
        group = GROUP if grouped and head.mixed and head.operands == torch.bfloat16 else 1
        per_row, width = vocabulary * head.compute.itemsize, self.hidden.shape[1]
        if ref_head is not None and self.ref_hidden is not None:
            per_row += vocabulary * ref_head.compute.itemsize
            width += self.ref_hidden.shape[1]
        per_row += group * vocabulary * head.operands.itemsize if head.mixed else 0
        per_row += 2 * head.compute.itemsize * width
        share = _MIXED_LOGITS_SHARE if head.mixed else _LOGITS_SHARE
        multiple = 1 if self.hidden.device.type == "cpu" else ROW_MULTIPLE
        return Plan(
            kept,
            len(kept) == len(self.labels),
            step_of(count, int(self.tile_bytes * share) // per_row, multiple),
            group,
        )

    def tiles(self, heads: Heads, plan: Plan) -> Iterator[Tile]:
        """Logits of the rows that count, tile by tile."""
        head, ref_head = heads
        count, step, vocabulary = len(plan.kept), plan.step, self.weight.shape[0]
        if count == 0:
            return
        buffer = torch.empty(step, vocabulary, dtype=head.compute, device=self.hidden.device)
        ref_buffer = buffer[:0]
        if ref_head is not None:
            ref_buffer = torch.empty(step, vocabulary, dtype=ref_head.compute, device=self.hidden.device)
        for start in range(0, count, step):
            index = plan.rows(start, min(start + step, count))
            hidden, size = self.hidden[index], min(step, count - start)
            logits = head.logits(hidden, buffer[:size])
            if self.top_k is not None:
                yield Tile(index, hidden, TopKRows(logits, self.labels[index], *self.top_k.at(index)))
            elif ref_head is not None and self.ref_hidden is not None:
                ref_logits = ref_head.logits(self.ref_hidden[index], ref_buffer[:size])
                yield Tile(index, hidden, Rows(logits, ref_logits, self.labels[index]))

    def row_options(self) -> Options:
        """Options with the share of the tile that is left to a pass over the rows of one."""
        share = self.tile_bytes // 8
        if self.top_k is None or self.hidden.device.type == "cpu":
            share = min(16 * 2**20, share)
        return self.options._replace(tile_bytes=max(1, share))


class _Accumulated:
    """Gradients summed over tiles; the head's in float32 whatever its dtype."""

    def __init__(self, inputs: LinearInputs, head: Head, plan: Plan, wanted: Wanted) -> None:
        self.head, self.inputs, self.plan = head, inputs, plan
        # float16 would lose what a loss that is scaled later still brings into range.
        held = head.compute if inputs.hidden.dtype == torch.float16 else inputs.hidden.dtype
        self.hidden = memory.zeros_like(inputs.hidden, dtype=held) if wanted.hidden else None
        # Not in huge pages: with a head of 152064 x 896, between calls that take and free other large tensors, a call
        # takes 2.4 to 2.9 s with them and 2.0 s without.
        self.weight = torch.empty_like(inputs.weight, dtype=head.compute) if wanted.weight else None
        self.empty = True
        self.bias = memory.zeros_like(inputs.weight[:, 0], dtype=head.compute) if wanted.bias else None
        # float16 needs the float32 gradient's size first; bfloat16 has its range, and is written at once.
        self.waiting: Tensor | None = None
        if head.operands == torch.bfloat16:
            rows = min(plan.group * plan.step, len(plan.kept))
            self.waiting = torch.empty(rows, inputs.weight.shape[0], dtype=head.operands, device=inputs.hidden.device)
        self.done, self.seen = 0, 0

    def add(self, tile: Tile, statistics: Any, upstream: Upstream) -> None:
        """Add a tile's, perhaps overwriting its logits; tiles come in the order of the plan."""
        options, size = self.inputs.row_options(), len(tile.hidden)
        out = tile.rows.logits
        if self.waiting is not None:
            out = self.waiting[self.seen - self.done :][:size]
        if isinstance(tile.rows, TopKRows):
            top_k_gradients(tile.rows, statistics, upstream, options, out)
        else:
            backend_for(tile.rows.logits, options).backward(tile.rows, statistics, upstream, options, out)
        self.seen += size
        if self.waiting is None:
            gradient, factor = self.head.operand(out)
            self._multiply(out, gradient, factor, tile.chosen, tile.hidden)
        elif self.seen - self.done == len(self.waiting) or self.seen == len(self.plan.kept):
            gradient, rows = self.waiting[: self.seen - self.done], self.plan.rows(self.done, self.seen)
            self._multiply(gradient, gradient, None, rows, self.inputs.hidden[rows])

    def _multiply(
        self, out: Tensor, gradient: Tensor, factor: Tensor | None, rows: Tensor | slice, hidden: Tensor
    ) -> None:
        """Add what the gradient of some logits gives.

        Args:
            out: (n, V) the gradient.
            gradient, factor: the same as products read it, from :meth:`Head.operand`.
            rows: which rows of the arguments they are.
            hidden: (n, D) the hidden states of these rows.
        """
        head = self.head
        if self.bias is not None:
            self.bias += out.sum(0, dtype=head.compute)
        if self.hidden is not None:
            self.hidden[rows] = head.hidden_gradient(gradient, factor).to(self.hidden.dtype)
        if self.weight is not None:
            # Nothing is read from memory that nobody has written yet.
            head.add_weight_gradient(self.weight, gradient, factor, hidden, replace=self.empty)
        self.empty, self.done = False, self.seen

    def result(self) -> Gradients:
        """In the dtypes of the arguments; float32 instead of float16."""
        weight = self.weight
        if weight is not None and self.empty:
            weight.zero_()
        if weight is not None and self.inputs.weight.dtype != torch.float16:
            weight = weight.to(self.inputs.weight.dtype)
        return Gradients(self.hidden, weight, self.bias)


def statistics_of(inputs: LinearInputs) -> Any:
    """Statistics (N,) of the kind of the inputs, zeros in ignored rows; a product for each head."""
    heads, options = inputs.heads(), inputs.row_options()
    result = empty_statistics(inputs, heads[0])
    for tile in inputs.tiles(heads, inputs.plan(heads, grouped=False)):
        _put(result, tile, _forward(tile, options))
    return result


def gradients_of(inputs: LinearInputs, statistics: Any, upstream: Upstream, wanted: Wanted) -> Gradients:
    """Gradients for upstream gradients (N,), from tiles computed again: four products."""
    heads = inputs.heads()
    plan = inputs.plan(heads, grouped=wanted.weight)
    total = _Accumulated(inputs, heads[0], plan, wanted)
    for tile in inputs.tiles(heads, plan):
        total.add(tile, statistics.at(tile.chosen), upstream.at(tile.chosen))
    return total.result()


def statistics_and_gradients(inputs: LinearInputs, upstream: Upstream, wanted: Wanted) -> tuple[Any, Gradients]:
    """Both from one visit to each tile: four products in all."""
    heads, options = inputs.heads(), inputs.row_options()
    result = empty_statistics(inputs, heads[0])
    plan = inputs.plan(heads, grouped=wanted.weight)
    total = _Accumulated(inputs, heads[0], plan, wanted)
    for tile in inputs.tiles(heads, plan):
        found = _forward(tile, options)
        _put(result, tile, found)
        total.add(tile, found, upstream.at(tile.chosen))
    return result, total.result()


def empty_statistics(inputs: LinearInputs, head: Head) -> Any:
    """Zeros for every row, of the kind of the inputs."""
    kind = inputs.kind()
    shape = (len(kind._fields), inputs.labels.shape[0])
    parts = kind(*torch.zeros(shape, dtype=head.compute, device=inputs.hidden.device))
    return parts._replace(centre=parts.centre.double()) if isinstance(parts, RowStatistics) else parts


def _forward(tile: Tile, options: Options) -> RowStatistics | TopKStatistics:
    if isinstance(tile.rows, TopKRows):
        return top_k_statistics(tile.rows, options)
    return backend_for(tile.rows.logits, options).forward(tile.rows, options)


def _put(result: Any, tile: Tile, found: RowStatistics | TopKStatistics) -> None:
    for target, source in zip(result, found, strict=True):
        target[tile.chosen] = source
