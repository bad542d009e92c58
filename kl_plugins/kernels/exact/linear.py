"""Exact KL from hidden states and the output head: only one tile of the logits exists at a time.

There are two modes. With autograd, the tiles are computed again in the backward pass, for any upstream gradient. If the
weights are known before the call, the gradient is computed in the forward pass, while the tile exists, and nothing is
computed twice.
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
"""Least number of rows per tile on a CPU.

Matrix products with fewer rows are slower there, and each tile reads and writes the head's gradient once.
"""

ROW_MULTIPLE = 128
"""Number of rows that an accelerator's matrix products process at once.

A tile with a few rows more takes as long as a tile with another 128.
"""

GROUP = 4
"""Number of tiles whose 16-bit gradients are held for one product with the hidden states.

Each of those products reads and writes the head's float32 gradient, 2 x 2.2 GB for a head of 152064 x 3584. With 512
rows per product, this takes longer than the arithmetic.
"""

_LOGITS_SHARE, _MIXED_LOGITS_SHARE = 3 / 4, 15 / 16


def default_tile_bytes(hidden: Tensor, vocabulary: int) -> int:
    """Return the default bound on temporaries, in bytes: small enough for caches, large enough for the products."""
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
        chosen: index of these rows in the arguments.
        hidden: (n, D) hidden states of these rows.
        rows: logits and labels of these rows.
    """

    chosen: Tensor | slice
    hidden: Tensor
    rows: Rows | TopKRows


class Plan(NamedTuple):
    """The division of rows into tiles.

    Attributes:
        kept: index of the rows that are not ignored.
        whole: whether no row is ignored.
        step: number of rows per tile.
        group: number of tiles whose gradients are held for one product.
    """

    kept: Tensor
    whole: bool
    step: int
    group: int

    def rows(self, start: int, stop: int) -> Tensor | slice:
        """Return an index that selects the kept rows with positions ``start`` to ``stop``."""
        return slice(start, stop) if self.whole else self.kept[start:stop]


def step_of(count: int, most: int, multiple: int) -> int:
    """Return the number of rows per tile.

    All tiles have about the same size, because a small last tile would waste a pass over the weight.

    Args:
        count: number of rows in all tiles together.
        most: largest number of rows that fits into memory.
        multiple: number of rows that the device's products process at once.
    """
    most = max(1, most)
    if most > multiple:
        most -= most % multiple
    step = -(-count // max(1, -(-count // most)))
    return min(most, -(-step // multiple) * multiple) if step > multiple else max(1, step)


Heads: TypeAlias = "tuple[Head, Head | None]"
"""The policy's head, and the reference's head or None if the reference is given as top-k tokens."""


class LinearInputs(NamedTuple):
    """The heads of policy and reference with their hidden states, labels and options; ignored rows are never computed.

    The reference is given either as a head with hidden states, or as its most probable tokens in each row.

    Attributes:
        hidden, weight, bias: (N, D), (V, D), and (V,) or None.
        ref_hidden, ref_weight, ref_bias: (N, D'), (V, D'), and (V,) or None; all None if ``top_k`` is given.
        labels: (N,) int64.
        top_k: most probable tokens of the reference in each row, or None.
        options: options for all rows.
        operands: dtypes that the two products read, from :func:`~kl_plugins.kernels.exact.products.operand_dtype`.
        tile_bytes: bound, in bytes, on everything except arguments, results and the weight's gradient.
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
        """Return the fields that hold tensors."""
        policy, reference = (self.hidden, self.weight, self.bias), (self.ref_hidden, self.ref_weight, self.ref_bias)
        return *policy, *reference, self.labels

    def settings(self) -> tuple[Any, ...]:
        """Return the other fields."""
        return self.top_k, self.options, self.operands, self.tile_bytes

    def kind(self) -> type[RowStatistics | TopKStatistics]:
        """Return the type of the rows' statistics."""
        return RowStatistics if self.top_k is None else TopKStatistics

    def heads(self) -> Heads:
        """Return the heads of policy and reference."""
        block = self.tile_bytes // 8
        policy = Head(self.weight, self.bias, self.operands[0], block)
        if self.ref_weight is None:
            return policy, None
        return policy, Head(self.ref_weight, self.ref_bias, self.operands[1], block)

    def plan(self, heads: Heads, *, grouped: bool) -> Plan:
        """Return how the rows that are not ignored are cut into tiles.

        Args:
            heads: result of :meth:`heads`.
            grouped: whether :data:`GROUP` tiles of 16-bit gradients are held; True if the weight needs a gradient.
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
        """Yield the logits of the rows that are not ignored, tile by tile."""
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
        """Return the options for a pass over the rows of one tile, with a part of the bound on temporaries."""
        share = self.tile_bytes // 8
        if self.top_k is None or self.hidden.device.type == "cpu":
            share = min(16 * 2**20, share)
        return self.options._replace(tile_bytes=max(1, share))


class _Accumulated:
    """Gradients summed over tiles. The head's gradient is at least float32, also for a 16-bit head."""

    def __init__(self, inputs: LinearInputs, head: Head, plan: Plan, wanted: Wanted) -> None:
        self.head, self.inputs, self.plan = head, inputs, plan
        # A float16 gradient would underflow here, before a loss that is scaled later brings it into range.
        held = head.compute if inputs.hidden.dtype == torch.float16 else inputs.hidden.dtype
        self.hidden = memory.zeros_like(inputs.hidden, dtype=held) if wanted.hidden else None
        # This tensor does not use huge pages. With a head of 152064 x 896, between calls that allocate and free other
        # large tensors, a call takes 2.4 to 2.9 s with huge pages and 2.0 s without.
        self.weight = torch.empty_like(inputs.weight, dtype=head.compute) if wanted.weight else None
        self.empty = True
        self.bias = memory.zeros_like(inputs.weight[:, 0], dtype=head.compute) if wanted.bias else None
        # A float16 gradient needs a factor that depends on the float32 gradient. bfloat16 has the range of float32, so
        # it is written directly.
        self.waiting: Tensor | None = None
        if head.operands == torch.bfloat16:
            rows = min(plan.group * plan.step, len(plan.kept))
            self.waiting = torch.empty(rows, inputs.weight.shape[0], dtype=head.operands, device=inputs.hidden.device)
        self.done, self.seen = 0, 0

    def add(self, tile: Tile, statistics: Any, upstream: Upstream) -> None:
        """Add the gradients of a tile, and possibly overwrite its logits. Tiles must come in the order of the plan."""
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
        """Add the gradients that follow from the gradient of some rows' logits.

        Args:
            out: (n, V) gradient of the logits.
            gradient, factor: the same gradient in the dtype that products read, from :meth:`Head.operand`.
            rows: index of these rows in the arguments.
            hidden: (n, D) hidden states of these rows.
        """
        head = self.head
        if self.bias is not None:
            self.bias += out.sum(0, dtype=head.compute)
        if self.hidden is not None:
            self.hidden[rows] = head.hidden_gradient(gradient, factor).to(self.hidden.dtype)
        if self.weight is not None:
            # The first product replaces the total, because its memory is not initialised.
            head.add_weight_gradient(self.weight, gradient, factor, hidden, replace=self.empty)
        self.empty, self.done = False, self.seen

    def result(self) -> Gradients:
        """Return the gradients in the dtypes of the arguments, but float32 instead of float16."""
        weight = self.weight
        if weight is not None and self.empty:
            weight.zero_()
        if weight is not None and self.inputs.weight.dtype != torch.float16:
            weight = weight.to(self.inputs.weight.dtype)
        return Gradients(self.hidden, weight, self.bias)


def statistics_of(inputs: LinearInputs) -> Any:
    """Compute statistics (N,) of the type of the inputs, zeros in ignored rows. It takes one product per head."""
    heads, options = inputs.heads(), inputs.row_options()
    result = empty_statistics(inputs, heads[0])
    for tile in inputs.tiles(heads, inputs.plan(heads, grouped=False)):
        _put(result, tile, _forward(tile, options))
    return result


def gradients_of(inputs: LinearInputs, statistics: Any, upstream: Upstream, wanted: Wanted) -> Gradients:
    """Compute gradients for upstream gradients (N,), from tiles that are computed again: four products."""
    heads = inputs.heads()
    plan = inputs.plan(heads, grouped=wanted.weight)
    total = _Accumulated(inputs, heads[0], plan, wanted)
    for tile in inputs.tiles(heads, plan):
        total.add(tile, statistics.at(tile.chosen), upstream.at(tile.chosen))
    return total.result()


def statistics_and_gradients(inputs: LinearInputs, upstream: Upstream, wanted: Wanted) -> tuple[Any, Gradients]:
    """Compute statistics and gradients in one visit to each tile: four products in total."""
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
    """Return statistics of the type of the inputs with zeros in all rows."""
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
