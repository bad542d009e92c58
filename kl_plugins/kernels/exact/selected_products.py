"""Logits of a few tokens of each row, from hidden states and those rows of the output head that they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kl_plugins.kernels.memory import zeros
from kl_plugins.numerics import cast_saturating


class SelectedProducts(torch.autograd.Function):
    """(hidden (N, D), weight (V, D), bias (V,) or None, ids (N, c), operands, tile_bytes) -> logits (N, c), float32.

    ``operands`` is the dtype that products read, from :func:`~kl_plugins.kernels.exact.products.operand_dtype`, and
    ``tile_bytes`` bounds the rows of the head that are gathered at once. The gradient of the weight is dense.
    """

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, operands: torch.dtype, tile_bytes: int
    ) -> Tensor:
        """Multiply the hidden states by the selected rows of the head."""
        compute = torch.promote_types(operands, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            found = hidden.new_empty(ids.shape, dtype=compute)
            for rows in _slices(ids, weight, compute, tile_bytes):
                of_tokens, state = weight[ids[rows]].to(operands).to(compute), hidden[rows].to(operands).to(compute)
                torch.bmm(of_tokens, state[..., None], out=found[rows][..., None])
            return found if bias is None else found.add_(bias[ids])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the arguments."""
        hidden, weight, bias, ids, ctx.operands, ctx.tile_bytes = inputs
        ctx.save_for_backward(hidden, weight, bias, ids)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gather the same rows again for the gradient of the hidden states, and add up that of the head."""
        hidden, weight, bias, ids = ctx.saved_tensors
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        (grad,) = grads
        compute = grad.dtype
        found = torch.empty_like(hidden, dtype=compute) if of_hidden else None
        total = zeros(weight.shape, compute, weight.device) if of_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _slices(ids, weight, compute, ctx.tile_bytes):
                if found is not None:
                    of_tokens = weight[ids[rows]].to(ctx.operands).to(compute)
                    found[rows] = torch.bmm(grad[rows][:, None], of_tokens)[:, 0]
                if total is not None:
                    state = hidden[rows].to(ctx.operands).to(compute)
                    total.index_add_(0, ids[rows].flatten(), (grad[rows][..., None] * state[:, None]).flatten(0, 1))
        summed = zeros(bias.shape, compute, bias.device) if of_bias else None
        if summed is not None:
            summed.index_add_(0, ids.flatten(), grad.flatten())
        pairs = (found, hidden), (total, weight), (summed, bias)
        return *(None if part is None else cast_saturating(part, like.dtype) for part, like in pairs), None, None, None


def _slices(ids: Tensor, weight: Tensor, compute: torch.dtype, tile_bytes: int) -> Iterator[slice]:
    """Yield slices of rows whose gathered parts of the head, and one copy of them, fit into ``tile_bytes``."""
    step = max(1, tile_bytes // max(1, 2 * ids.shape[1] * weight.shape[1] * compute.itemsize))
    for start in range(0, len(ids), step):
        yield slice(start, start + step)


selected_products: Callable[..., Tensor] = SelectedProducts.apply
"""Apply :class:`SelectedProducts`."""
