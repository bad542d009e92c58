"""Exact KL of rows of logits as a differentiable function. The only large tensor it allocates is the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kl_plugins.kernels.exact.autograd import BackwardPass, flattened, for_each_argument, named
from kl_plugins.kernels.exact.backends import backend_for
from kl_plugins.kernels.exact.statistics import IGNORE_INDEX, Rows, RowStatistics, Upstream


def check_labels(labels: Tensor, vocabulary: int) -> None:
    """Raise if a label is neither a token nor the ignored label. On an accelerator the check does not synchronise."""
    valid = ((labels >= 0) & (labels < vocabulary)) | (labels == IGNORE_INDEX)
    if labels.device.type == "cpu":
        if not valid.all():
            wrong = int(labels[~valid][0])
            raise ValueError(f"label {wrong} is outside the vocabulary of {vocabulary} (ignored ones are -100)")
    else:
        torch._assert_async(valid.all(), f"kl-plugins: a label is outside the vocabulary of {vocabulary}")


class LogitsKL(torch.autograd.Function):
    """(*Rows, options) -> RowStatistics; kl and logp are differentiable."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        """Compute the statistics of the rows."""
        rows, options = named(args, Rows)
        check_labels(rows.labels, rows.logits.shape[-1])
        with torch.autocast(rows.logits.device.type, enabled=False):
            return tuple(backend_for(rows.logits, options).forward(rows, options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save the logits, which the model keeps anyway, and five numbers per row."""
        *rows, ctx.options = inputs
        ctx.save_for_backward(*rows, *output)
        ctx.mark_non_differentiable(*output[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Compute both gradients at once, in the dtype of the logits."""
        upstream = RowStatistics(*grads)
        return for_each_argument(
            ctx, logits_gradient(*ctx.saved_tensors, *Upstream(upstream.kl, upstream.logp), ctx.options)
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Treat a batch of rows as more rows."""
        found = logits_kl(*flattened(info, in_dims, args))
        return tuple(part.reshape(info.batch_size, -1) for part in found), (0,) * len(found)


class LogitsGradient(BackwardPass):
    """The backward pass of :class:`LogitsKL`: (*Rows, *RowStatistics, *Upstream, options) -> gradient (N, V)."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        """Compute the gradient with respect to the policy's logits."""
        rows, statistics, upstream, options = named(args, Rows, RowStatistics, Upstream)
        with torch.autocast(rows.logits.device.type, enabled=False):
            return backend_for(rows.logits, options).backward(rows, statistics, upstream, options)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        """Treat a batch of rows as more rows."""
        rows = flattened(info, in_dims, args)
        return logits_gradient(*rows).reshape(info.batch_size, -1, rows[0].shape[-1]), 0


logits_kl: Callable[..., tuple[Tensor, ...]] = LogitsKL.apply
"""Apply :class:`LogitsKL`."""

logits_gradient: Callable[..., Tensor] = LogitsGradient.apply
"""Apply :class:`LogitsGradient`."""
