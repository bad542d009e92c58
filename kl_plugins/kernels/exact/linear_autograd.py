"""The two modes of :mod:`kl_plugins.kernels.exact.linear` as differentiable functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kl_plugins.kernels import memory
from kl_plugins.kernels.exact.autograd import BackwardPass, for_each_argument, named
from kl_plugins.kernels.exact.linear import (
    Gradients,
    LinearInputs,
    Wanted,
    gradients_of,
    statistics_and_gradients,
    statistics_of,
)
from kl_plugins.kernels.exact.logits import check_labels
from kl_plugins.kernels.exact.statistics import IGNORE_INDEX, Upstream
from kl_plugins.numerics import cast_saturating

_NOTHING = Wanted(hidden=False, weight=False, bias=False)


def wanted_gradients(inputs: LinearInputs) -> Wanted:
    """Return which gradients to compute: none under ``no_grad``, and no weight gradient for a frozen head."""
    if not torch.is_grad_enabled():
        return _NOTHING
    bias = inputs.bias is not None and inputs.bias.requires_grad
    return Wanted(inputs.hidden.requires_grad, inputs.weight.requires_grad, bias)


class LinearKL(torch.autograd.Function):
    """(*LinearInputs, rows_first) -> statistics of the inputs' type and None, for any upstream gradient of kl and logp.

    It takes 2 products forward and up to 4 backward. With ``rows_first``, the gradient of kl with respect to the hidden
    states is computed in the forward pass and returned instead of None. This costs one product more, and the backward
    pass only scales the gradient. It is meant for a frozen head when the gradient of logp is not needed.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor | None, ...]:
        """Compute the statistics of the rows, and with ``rows_first`` the gradient of their kl (else None)."""
        inputs, rows_first = named(args, LinearInputs)
        check_labels(inputs.labels, inputs.weight.shape[0])
        with torch.autocast(inputs.hidden.device.type, enabled=False):
            if not rows_first:
                return *statistics_of(inputs), None
            one = torch.ones_like(inputs.labels, dtype=torch.float32)
            wanted = Wanted(hidden=True, weight=False, bias=False)
            statistics, gradients = statistics_and_gradients(inputs, Upstream(one, one * 0.0), wanted)
            return *statistics, gradients.hidden

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Save the arguments and five numbers per row, or only the rows' gradient."""
        given, ctx.rows_first = named(inputs, LinearInputs)
        ctx.kind = given.kind()
        statistics, rows_gradient = named(output, ctx.kind)
        # Otherwise autograd would allocate zeros as large as the hidden states for an output without a gradient.
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.dtype = given.settings(), given.hidden.dtype
        constant = [*statistics[1 if ctx.rows_first else 2 :], rows_gradient]
        ctx.mark_non_differentiable(*(part for part in constant if part is not None))
        if ctx.rows_first:
            ctx.save_for_backward(rows_gradient)
        else:
            ctx.save_for_backward(*statistics, *given.tensors())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the gradients of hidden states, weight and bias."""
        given, _ = named(grads, ctx.kind)
        if ctx.rows_first:
            (rows_gradient,) = ctx.saved_tensors
            if given.kl is None:
                return for_each_argument(ctx)
            # Ignored rows hold zeros. An upstream NaN there must not reach the gradient.
            scaled = torch.where(rows_gradient == 0, 0.0, rows_gradient.to(given.kl.dtype) * given.kl[:, None])
            return for_each_argument(ctx, cast_saturating(scaled, ctx.dtype))
        statistics, *tensors = named(ctx.saved_tensors, ctx.kind)
        zeros = torch.zeros_like(statistics.kl)
        upstream = Upstream(*(zeros if grad is None else grad for grad in (given.kl, given.logp)))
        wanted = ctx.needs_input_grad[: len(Wanted._fields)]
        return for_each_argument(ctx, *linear_gradient(*tensors, *ctx.settings, *statistics, *upstream, *wanted))


class LinearGradient(BackwardPass):
    """The backward pass of :class:`LinearKL`: (*LinearInputs, *statistics, *Upstream, *Wanted) -> Gradients."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor | None, ...]:
        """Compute the gradients in the dtypes of the arguments."""
        inputs, *others = named(args, LinearInputs)
        statistics, upstream, wanted = named(tuple(others), inputs.kind(), Upstream, Wanted)
        with torch.autocast(inputs.hidden.device.type, enabled=False):
            found = gradients_of(inputs, statistics, upstream, wanted)
        given = (inputs.hidden, inputs.weight, inputs.bias)
        return tuple(
            None if gradient is None or tensor is None else cast_saturating(gradient, tensor.dtype)
            for gradient, tensor in zip(found, given, strict=True)
        )


class LinearLoss(torch.autograd.Function):
    """(*LinearInputs, *Upstream, *Wanted) -> *Gradients, loss, kl, logp, ref_logp, with 4 products in total.

    The loss is the sum of kl and logp times their upstream gradients. Its gradient is computed in the forward pass.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor | None, ...]:
        """Compute the gradients, the loss, and the kl and log-probs that it is made of."""
        inputs, weights, wanted = named(args, LinearInputs, Upstream, Wanted)
        check_labels(inputs.labels, inputs.weight.shape[0])
        kept = inputs.labels != IGNORE_INDEX
        weights = Upstream(*(weight.masked_fill(~kept, 0.0) for weight in weights))
        with torch.autocast(inputs.hidden.device.type, enabled=False):
            if wanted == _NOTHING:
                statistics, gradients = statistics_of(inputs), Gradients(None, None, None)
            else:
                statistics, gradients = statistics_and_gradients(inputs, weights, wanted)
            loss = (statistics.kl * weights.kl + statistics.logp * weights.logp).sum()
        return *gradients, loss, statistics.kl, statistics.logp, statistics.ref_logp

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Save the gradients; nothing else is needed."""
        given, *_ = named(inputs, LinearInputs)
        gradients, _, *constant = named(output, Gradients)
        ctx.set_materialize_grads(False)  # Avoids zeros as large as the head's gradient.
        ctx.dtypes = [None if part is None else part.dtype for part in (given.hidden, given.weight, given.bias)]
        ctx.mark_non_differentiable(*(part for part in (*gradients, *constant) if part is not None))
        ctx.save_for_backward(*gradients)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Scale the saved gradients by the upstream gradient of the loss."""
        _, grad, *_ = named(grads, Gradients)
        scaled = [
            None if kept is None or grad is None else cast_saturating(_scaled(kept, grad), dtype)
            for kept, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return for_each_argument(ctx, *scaled)


def _scaled(kept: Tensor, grad: Tensor) -> Tensor:
    # Written in place if no second backward pass can follow, because the head's gradient is as large as the head.
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    last = keeps_graph is not None and not keeps_graph() and not torch.is_grad_enabled()
    return torch.mul(kept, grad, out=kept if last else memory.empty_like(kept))


linear_rows: Callable[..., tuple[Tensor, ...]] = LinearKL.apply
"""Apply :class:`LinearKL`."""

linear_gradient: Callable[..., tuple[Tensor | None, ...]] = LinearGradient.apply
"""Apply :class:`LinearGradient`."""

linear_loss: Callable[..., tuple[Tensor, ...]] = LinearLoss.apply
"""Apply :class:`LinearLoss`."""
