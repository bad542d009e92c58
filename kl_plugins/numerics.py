"""Numeric policy: compute dtype, bounds before ``exp``, saturation, masking.

Finite input never gives a non-finite output. Clamps act on detached values; no gradient passes through them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LINEAR_LIMIT = 1e4
"""Linear and quadratic uses of a log-ratio saturate here (nats)."""


@dataclass(frozen=True)
class Limits:
    """Bounds that apply to one computation.

    Attributes:
        bound: largest absolute argument of an ``exp``, nats.
        largest: results saturate here, far enough below overflow that products and sums over tokens stay finite.
    """

    bound: float
    largest: float

    @classmethod
    def of(cls, dtype: torch.dtype, bound: float) -> Limits:
        """Limits for a compute dtype; a user's bound is lowered to what the dtype can hold."""
        return cls(min(bound, 600.0), 1e250) if dtype == torch.float64 else cls(min(bound, 60.0), 1e30)

    def linear(self, u: Tensor) -> Tensor:
        """A log-ratio for linear and quadratic uses."""
        return u.clamp(-LINEAR_LIMIT, LINEAR_LIMIT)

    def exponent(self, u: Tensor) -> Tensor:
        """A log-ratio for uses inside an ``exp``."""
        return u.clamp(-self.bound, self.bound)

    def saturate(self, x: Tensor) -> Tensor:
        """Bring overflow back into range; NaN stays NaN, to be seen."""
        return x.clamp(-self.largest, self.largest)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where any input is float64, float32 for 16- and 32-bit floats."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def masked_difference(a: Tensor, b: Tensor, mask: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``a - b`` on response tokens, 0 elsewhere, whatever stands there.

    Args:
        a: (B, T) log-probs, nats, any float dtype.
        b: (B, T) log-probs, nats, any float dtype.
        mask: (B, T), True on response tokens.
        dtype: compute dtype; default :func:`compute_dtype`.

    Returns:
        (B, T) log-ratio, nats, saturated at :data:`LINEAR_LIMIT`.
    """
    dtype = dtype or compute_dtype(a, b)
    difference = a.to(dtype) - b.to(dtype)
    # The clamp keeps sums over tokens finite even where two finite float32 numbers differ by more than float32 holds.
    return difference.masked_fill(~mask.bool(), 0.0).clamp(-LINEAR_LIMIT, LINEAR_LIMIT)


def masked_exact(exact: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Full-vocabulary KL values on response tokens, detached, saturated, 0 elsewhere; (B, T), nats."""
    largest = Limits.of(dtype, LINEAR_LIMIT).largest
    return exact.detach().to(dtype).clamp(-largest, largest).masked_fill(~mask, 0.0)


def held(number: float, dtype: torch.dtype) -> float:
    """A number of the spec as ``dtype`` can hold it; torch refuses to compare or clamp with a larger one."""
    largest: float = torch.finfo(dtype).max
    return min(number, largest)


def cast_saturating(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to ``dtype``; what 16 bits cannot hold becomes the largest number they can."""
    if dtype == x.dtype or dtype == torch.float64:
        return x.to(dtype)
    info = torch.finfo(dtype)
    return x.clamp(info.min, info.max).to(dtype)


def check_shapes(mask: Tensor, **log_probs: Tensor | None) -> None:
    """Raise unless every tensor is a float (B, T) like ``mask``.

    Raises:
        ValueError: a shape differs or is not two-dimensional.
        TypeError: a dtype is not floating point.
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
