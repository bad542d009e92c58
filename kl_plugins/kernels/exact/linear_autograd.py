"""The two modes of :mod:`kl_plugins.kernels.exact.linear` as differentiable functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kl_plugins.kernels import memory
from kl_plugins.kernels.exact.linear import (
    Gradients,
    LinearInputs,
    Wanted,
    gradients_of,
    statistics_and_gradients,
    statistics_of,
)
from kl_plugins.kernels.exact.logits import check_labels
from kl_plugins.kernels.exact.statistics import IGNORE_INDEX, RowStatistics
from kl_plugins.numerics import cast_saturating

_TENSORS = 7
_NOTHING = Wanted(hidden=False, weight=False, bias=False)


def wanted_gradients(inputs: LinearInputs) -> Wanted:
    """What has to be computed: nothing under ``no_grad``, no weight gradient for a frozen head."""
    if not torch.is_grad_enabled():
        return _NOTHING
    bias = inputs.bias is not None and inputs.bias.requires_grad
    return Wanted(inputs.hidden.requires_grad, inputs.weight.requires_grad, bias)


def tensors_of(inputs: LinearInputs) -> tuple[Tensor | None, ...]:
    """The tensor fields, as autograd wants to see them."""
    return (
        inputs.hidden,
        inputs.weight,
        inputs.bias,
        inputs.ref_hidden.detach(),
        inputs.ref_weight.detach(),
        None if inputs.ref_bias is None else inputs.ref_bias.detach(),
        inputs.labels,
    )


def settings_of(inputs: LinearInputs) -> tuple[Any, ...]:
    """The other fields."""
    return inputs.options, inputs.operands, inputs.tile_bytes


class LinearKL(torch.autograd.Function):
    """Row statistics with any upstream gradient for kl and logp: 2 products forward, up to 4 backward.

    With ``rows_first`` the gradient of kl with respect to the hidden states is computed in the forward pass, one
    product more, and only scaled in the backward pass: for a frozen head, where nobody wants logp's gradient.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor | None, ...]:
        """(7 tensors, settings, rows_first) -> the five statistics and the gradient of the rows' kl, or None."""
        *tensors, settings, rows_first = args
        inputs = LinearInputs(*tensors, *settings)
        check_labels(inputs.labels, inputs.weight.shape[0])
        with torch.autocast(inputs.hidden.device.type, enabled=False):
            if not rows_first:
                return *statistics_of(inputs), None
            one = torch.ones_like(inputs.labels, dtype=torch.float32)
            wanted = Wanted(hidden=True, weight=False, bias=False)
            statistics, gradients = statistics_and_gradients(inputs, one, one * 0.0, wanted)
            return *statistics, gradients.hidden

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Keep the arguments and five numbers a row, or the rows' gradient alone."""
        *tensors, ctx.settings, rows_first = inputs
        # Else zeros as large as the hidden states, for an output that is not differentiable.
        ctx.set_materialize_grads(False)
        ctx.rows_first, ctx.dtype = rows_first, inputs[0].dtype
        ctx.mark_non_differentiable(*(part for part in output[1 if rows_first else 2 :] if part is not None))
        if rows_first:
            ctx.save_for_backward(output[5])
        else:
            ctx.save_for_backward(*tensors, *output[:5])

    @staticmethod
    def backward(ctx: Any, grad_kl: Tensor | None, grad_logp: Tensor | None, *_: Any) -> tuple[Any, ...]:
        """Gradients of hidden states, weight and bias."""
        unused = (None,) * (_TENSORS - 3 + 2)
        if ctx.rows_first:
            (rows,) = ctx.saved_tensors
            if grad_kl is None:
                return None, None, None, *unused
            # Ignored rows hold zeros, and an upstream NaN there must stay outside.
            scaled = torch.where(rows == 0, 0.0, rows.to(grad_kl.dtype) * grad_kl[:, None])
            return cast_saturating(scaled, ctx.dtype), None, None, *unused
        tensors, statistics = ctx.saved_tensors[:_TENSORS], ctx.saved_tensors[_TENSORS:]
        upstream = [torch.zeros_like(statistics[0]) if grad is None else grad for grad in (grad_kl, grad_logp)]
        found = linear_gradient(*tensors, ctx.settings, *statistics, *upstream, ctx.needs_input_grad[:3])
        return *found, *unused


class LinearGradient(torch.autograd.Function):
    """The backward pass of :class:`LinearKL`; not differentiable again."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor | None, ...]:
        """(7 tensors, settings, five statistics, grad_kl, grad_logp, wanted) -> gradients in the arguments' dtypes."""
        inputs = LinearInputs(*args[:_TENSORS], *args[_TENSORS])
        *statistics, grad_kl, grad_logp, wanted = args[_TENSORS + 1 :]
        with torch.autocast(inputs.hidden.device.type, enabled=False):
            found = gradients_of(inputs, RowStatistics(*statistics), grad_kl, grad_logp, Wanted(*wanted))
        given = (inputs.hidden, inputs.weight, inputs.bias)
        return tuple(
            None if gradient is None or tensor is None else cast_saturating(gradient, tensor.dtype)
            for gradient, tensor in zip(found, given, strict=True)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Refuse."""
        raise NotImplementedError("the exact KL has no second derivatives")


class LinearLoss(torch.autograd.Function):
    """sum of kl_weight kl + logp_weight logp, its gradient computed in the forward pass: 4 products in all."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor | None, ...]:
        """(7 tensors, settings, kl_weight, logp_weight, wanted) -> loss, kl, logp, ref_logp and three gradients."""
        *tensors, settings, kl_weight, logp_weight, wanted = args
        inputs = LinearInputs(*tensors, *settings)
        check_labels(inputs.labels, inputs.weight.shape[0])
        kept = inputs.labels != IGNORE_INDEX
        kl_weight, logp_weight = (weight.masked_fill(~kept, 0.0) for weight in (kl_weight, logp_weight))
        with torch.autocast(inputs.hidden.device.type, enabled=False):
            if wanted == _NOTHING:
                statistics, gradients = statistics_of(inputs), Gradients(None, None, None)
            else:
                statistics, gradients = statistics_and_gradients(inputs, kl_weight, logp_weight, wanted)
            loss = (statistics.kl * kl_weight + statistics.logp * logp_weight).sum()
        return loss, *statistics[:3], *gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Keep the gradients; nothing else is needed."""
        ctx.set_materialize_grads(False)  # zeros as large as the head's gradient
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:3]]
        ctx.mark_non_differentiable(*(part for part in output[1:] if part is not None))
        ctx.save_for_backward(*output[4:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        """Scale by the upstream gradient of the loss."""
        scaled = [
            None if kept is None or grad is None else cast_saturating(_scaled(kept, grad), dtype)
            for kept, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, *(None,) * (_TENSORS - 3 + 4)


def _scaled(kept: Tensor, grad: Tensor) -> Tensor:
    # In place where nobody can come back for it: the head's gradient is as large as the head.
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    last = keeps_graph is not None and not keeps_graph() and not torch.is_grad_enabled()
    return torch.mul(kept, grad, out=kept if last else memory.empty_like(kept))


linear_rows: Callable[..., tuple[Tensor, ...]] = LinearKL.apply
""":class:`LinearKL` as the function it is."""

linear_gradient: Callable[..., tuple[Tensor | None, ...]] = LinearGradient.apply
""":class:`LinearGradient` as the function it is."""

linear_loss: Callable[..., tuple[Tensor, ...]] = LinearLoss.apply
""":class:`LinearLoss` as the function it is."""
