"""Shared parts of the exact kernels' autograd functions: named arguments, and backward passes as separate functions.

Autograd follows only tensors that are passed directly as arguments, not tensors inside an argument. So every function
is applied to the fields of its named tuples, one after the other, and :func:`named` builds the tuples again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def named(args: tuple[Any, ...], *kinds: Any) -> list[Any]:
    """Build named tuples from a function's arguments.

    Args:
        args: the fields of the tuples, in order; further arguments may follow.
        kinds: the types of the tuples.

    Returns:
        The tuples, then each further argument.
    """
    found: list[Any] = []
    for kind in kinds:
        count = len(kind._fields)
        found.append(kind(*args[:count]))
        args = args[count:]
    return [*found, *args]


def for_each_argument(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the result of a backward pass: gradients for a function's first arguments, None for all others."""
    return *gradients, *(None,) * (len(ctx.needs_input_grad) - len(gradients))


def flattened(info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> list[Any]:
    """Return the arguments of a function that ``vmap`` calls, with the batch dimension merged into the rows."""
    return [_flat(arg, dim, info.batch_size) for arg, dim in zip(args, in_dims, strict=True)]


def _flat(value: Any, dim: int | None, size: int) -> Any:
    if not isinstance(value, Tensor):
        return value
    batched = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
    return batched.flatten(0, 1)


class BackwardPass(torch.autograd.Function):
    """A backward pass as a separate function, which cannot be differentiated again.

    ``torch.autograd.function.once_differentiable`` on an ordinary ``backward`` was tried instead, on the KL of logits.
    ``torch.func.vmap`` of ``torch.func.grad`` failed, because such a backward pass gets batched tensors and has no rule
    for them. A second ``torch.func.grad`` returned zeros without any error. ``autograd.grad(..., create_graph=True)``
    gave a gradient without a graph, so that the error of the second pass does not name the cause. As a function the
    backward pass can have a ``vmap`` rule, and every second derivative raises.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save nothing."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Raise NotImplementedError, because second derivatives are not implemented."""
        raise NotImplementedError("the exact KL has no second derivatives")
