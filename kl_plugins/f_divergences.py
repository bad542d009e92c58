"""f-divergences D = E_policy[f(delta)] with delta = reference/policy: accurate closed forms, and estimators from f.

By arXiv 2601.10201, Theorem 4.1, the coefficient of grad log policy is c(delta) = f(delta) - delta f'(delta). The code
subtracts the constant c(1), which does not change the expected gradient. The arguments (u, x) of the functions are
described in :mod:`kl_plugins.estimators`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Elementwise: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"


def jsd_value(u: Tensor, x: Tensor) -> Tensor:
    """f(delta) of the Jensen-Shannon divergence, in nats; elementwise."""
    # The textbook form loses its digits by cancellation near u = 0. This form, with y = x/2, is
    # (1+delta)/2 * (y tanh y - log cosh y).
    y = x / 2
    return ((-x).exp() + 1) / 2 * (y * y.tanh() - y.sinh().square().log1p() / 2).clamp_min(0.0)


def alpha_value(a: float, u: Tensor, x: Tensor) -> Tensor:
    """f(delta) of the alpha-divergence with a > 0, in nats; elementwise."""
    # The formula is (delta^a - a delta + a - 1) / (a (a - 1)). It is arranged so that it is accurate near a = 1, where
    # it is the forward KL, and near a = 0.
    a = _held(a)
    if a < 0.5:
        return (((-a * x).expm1() / a - (-x).expm1()) / (a - 1)).clamp_min(0.0)
    h = -x if a == 1 else (-(a - 1) * x).expm1() / (a - 1)
    return (((-x).exp() * h - (-x).expm1()) / a).clamp_min(0.0)


def alpha_coefficient(a: float, u: Tensor, x: Tensor) -> Tensor:
    """Coefficient (1 - delta^a)/a of the alpha-divergence; elementwise."""
    a = _held(a)
    return -(-a * x).expm1() / a


def _held(a: float) -> float:
    # Beyond these limits the divergence equals its limit value to rounding, and float32 cannot represent a.
    return min(max(a, 1e-20), 1e30)


def derive_from_f(f: Callable[[Tensor], Tensor]) -> tuple[Elementwise, Elementwise]:
    """Derive value and coefficient of an f-divergence from its generator f.

    The coefficient is c(delta) - c(1) with c = f - delta f'; see arXiv 2601.10201, Theorem 4.1.

    Args:
        f: elementwise function of delta = reference/policy, written with torch operations, convex and differentiable,
            with f(1) = 0.

    Returns:
        The ``value`` (nats) and ``coefficient`` functions of an :class:`~kl_plugins.estimators.Estimator`.
    """

    def value(u: Tensor, x: Tensor) -> Tensor:
        # Where f overflows, it is +inf, because it is convex. The terms of f may give NaN there (inf - inf).
        return _unless_overflown(f((-x).exp()), x, math.inf)

    def coefficient(u: Tensor, x: Tensor) -> Tensor:
        from torch import ones_like, zeros_like
        from torch.func import vjp

        def uncentred(x: Tensor) -> Tensor:
            # With F(x) = f(exp(-x)), delta f'(delta) is -dF/dx.
            value_of_x, pull_back = vjp(lambda z: f((-z).exp()), x)[:2]
            result: Tensor = value_of_x + pull_back(ones_like(x))[0]
            return result

        # f is convex, so f - delta f' increases with u. Where it overflows, the result has the sign of u.
        return _unless_overflown(uncentred(x) - uncentred(zeros_like(x)), x, x.sign() * math.inf)

    return value, coefficient


def _unless_overflown(result: Tensor, x: Tensor, limit: Tensor | float) -> Tensor:
    return result.where(result.isfinite() | ~x.isfinite(), limit)
