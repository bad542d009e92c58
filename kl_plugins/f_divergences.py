"""f-divergences D = E_policy[f(delta)], delta = ref/policy: closed forms that cancel elsewhere, and c from f alone.

See arXiv 2601.10201, Theorem 4.1: the coefficient of grad log policy is c = f - delta f', less its value at delta = 1.
Arguments are the two views of the log-ratio that :mod:`kl_plugins.estimators` describes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Elementwise: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"


def jsd_value(u: Tensor, x: Tensor) -> Tensor:
    """f(delta) of the Jensen-Shannon divergence, (B, T), nats."""
    # (1+delta)/2 * (y tanh y - log cosh y), y = x/2: the textbook form cancels near u = 0.
    y = x / 2
    return ((-x).exp() + 1) / 2 * (y * y.tanh() - y.sinh().square().log1p() / 2).clamp_min(0.0)


def alpha_value(a: float, u: Tensor, x: Tensor) -> Tensor:
    """f(delta) of the alpha-divergence, a > 0, (B, T), nats."""
    # (delta^a - a delta + a - 1) / (a (a - 1)), arranged so that neither a = 1 (forward KL) nor a -> 0 is a hole.
    a = _held(a)
    if a < 0.5:
        return (((-a * x).expm1() / a - (-x).expm1()) / (a - 1)).clamp_min(0.0)
    h = -x if a == 1 else (-(a - 1) * x).expm1() / (a - 1)
    return (((-x).exp() * h - (-x).expm1()) / a).clamp_min(0.0)


def alpha_coefficient(a: float, u: Tensor, x: Tensor) -> Tensor:
    """Coefficient (1 - delta^a)/a of the alpha-divergence, (B, T)."""
    a = _held(a)
    return -(-a * x).expm1() / a


def _held(a: float) -> float:
    # Beyond these limits the divergence is its own limit to rounding, and float32 could not hold a.
    return min(max(a, 1e-20), 1e30)


def derive_from_f(f: Callable[[Tensor], Tensor]) -> tuple[Elementwise, Elementwise]:
    """Value and coefficient of an f-divergence from f alone: c = f - delta f', less its value at delta = 1.

    See arXiv 2601.10201, Theorem 4.1.

    Args:
        f: convex, f(1) = 0, elementwise and differentiable in delta, written with torch operations.

    Returns:
        The ``value`` and ``coefficient`` functions of an :class:`Estimator`.
    """

    def value(u: Tensor, x: Tensor) -> Tensor:
        # A convex f overflows upwards; inf - inf among its terms would say NaN.
        return _unless_overflown(f((-x).exp()), x, math.inf)

    def coefficient(u: Tensor, x: Tensor) -> Tensor:
        from torch import ones_like, zeros_like
        from torch.func import vjp

        def own(x: Tensor) -> Tensor:
            # delta f'(delta) = -dF/dx for F(x) = f(exp(-x)).
            value_of_x, pull_back = vjp(lambda z: f((-z).exp()), x)[:2]
            result: Tensor = value_of_x + pull_back(ones_like(x))[0]
            return result

        # f - delta f' grows with u, because f is convex: what overflows has the sign of u.
        return _unless_overflown(own(x) - own(zeros_like(x)), x, x.sign() * math.inf)

    return value, coefficient


def _unless_overflown(result: Tensor, x: Tensor, limit: Tensor | float) -> Tensor:
    return result.where(result.isfinite() | ~x.isfinite(), limit)
