"""Numerical rules of the package: compute dtype, bounds on arguments of ``exp``, saturation, and masking.

Finite input never gives a non-finite output. Clamps act on detached values, so they never change or stop a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LINEAR_LIMIT = 1e4
"""Largest absolute log-ratio, in nats, in linear and quadratic uses; larger ones saturate."""


@dataclass(frozen=True)
class Limits:
    """Bounds of one computation.

    Attributes:
        bound: largest absolute argument of an ``exp``, in nats.
        largest: largest absolute result. It is far enough below overflow that products and sums over tokens stay
            finite.
    """

    bound: float
    largest: float

    @classmethod
    def of(cls, dtype: torch.dtype, bound: float) -> Limits:
        """Return the limits for a compute dtype.

        Args:
            dtype: float32 or float64.
            bound: the spec's bound, in nats. It is lowered to 60 for float32 and to 600 for float64, so that ``exp``
                does not overflow.
        """
        return cls(min(bound, 600.0), 1e250) if dtype == torch.float64 else cls(min(bound, 60.0), 1e30)

    def linear(self, u: Tensor) -> Tensor:
        """Clamp log-ratios (nats, any shape) for linear and quadratic uses."""
        return u.clamp(-LINEAR_LIMIT, LINEAR_LIMIT)

    def exponent(self, u: Tensor) -> Tensor:
        """Clamp log-ratios (nats, any shape) for uses inside an ``exp``."""
        return u.clamp(-self.bound, self.bound)

    def saturate(self, x: Tensor) -> Tensor:
        """Clamp results to the largest value; NaN stays NaN, so that it is not hidden."""
        return x.clamp(-self.largest, self.largest)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype to compute in: float64 if any tensor is float64, otherwise float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def masked_difference(a: Tensor, b: Tensor, mask: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Compute ``a - b`` on response tokens, and 0 elsewhere, even if padding holds NaN or infinity.

    Args:
        a: (B, T) log-probs, nats, any float dtype.
        b: (B, T) log-probs, nats, any float dtype.
        mask: (B, T), True on response tokens.
        dtype: the dtype to compute in; by default the result of :func:`compute_dtype`.

    Returns:
        (B, T) log-ratio in that dtype, nats, clamped to +-:data:`LINEAR_LIMIT`.
    """
    dtype = dtype or compute_dtype(a, b)
    difference = a.to(dtype) - b.to(dtype)
    # The difference of two finite float32 numbers can overflow. The clamp keeps sums over tokens finite in that case.
    return difference.masked_fill(~mask.bool(), 0.0).clamp(-LINEAR_LIMIT, LINEAR_LIMIT)


def masked_exact(exact: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return exact KL values on response tokens, detached and saturated, and 0 elsewhere.

    Args:
        exact: (B, T) KL over the whole vocabulary at each token, nats, any float dtype.
        mask: (B, T) bool, True on response tokens.
        dtype: compute dtype.

    Returns:
        (B, T) in ``dtype``, nats.
    """
    largest = Limits.of(dtype, LINEAR_LIMIT).largest
    return exact.detach().to(dtype).clamp(-largest, largest).masked_fill(~mask, 0.0)


def held(number: float, dtype: torch.dtype) -> float:
    """Limit a number of the spec to the largest finite number of ``dtype``.

    torch raises an error if a tensor is compared with, or clamped to, a number that its dtype cannot hold.
    """
    largest: float = torch.finfo(dtype).max
    return min(number, largest)


def cast_saturating(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a tensor of any shape to ``dtype``; values outside the range of ``dtype`` become its largest or smallest."""
    if dtype == x.dtype or dtype == torch.float64:
        return x.to(dtype)
    info = torch.finfo(dtype)
    return x.clamp(info.min, info.max).to(dtype)


def check_shapes(mask: Tensor, **log_probs: Tensor | None) -> None:
    """Check that every tensor of log-probs has a floating-point dtype and the shape (B, T) of the mask.

    Args:
        mask: (B, T), any dtype.
        log_probs: tensors by the name that an error message shows; None is skipped.

    Raises:
        ValueError: The mask is not two-dimensional, or the shape of a tensor differs from that of the mask.
        TypeError: The dtype of a tensor is not a floating-point one.
    """
    if mask.dim() != 2:
        raise ValueError(f"mask must be (B, T), not {tuple(mask.shape)}")
    for name, tensor in log_probs.items():
        if tensor is None:
            continue
        if tensor.shape != mask.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, mask {tuple(mask.shape)}; both must be (B, T)")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} holds {tensor.dtype}, expected floating-point log-probs in nats")
