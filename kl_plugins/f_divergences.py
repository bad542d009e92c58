"""f-divergences D = E_policy[f(delta)], delta = ref/policy: closed forms that cancel elsewhere, and c from f alone.

See arXiv 2601.10201, Theorem 4.1: the coefficient of grad log policy is c = f - delta f', less its value at delta = 1.
Arguments are the two views of the log-ratio that :mod:`kl_plugins.estimators` describes.
"""

from __future__ import annotations

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
    # (delta^a - a delta + a - 1) / (a (a - 1)), arranged so that a = 1 (forward KL) is not a hole.
    h = -x if a == 1 else (-(a - 1) * x).expm1() / (a - 1)
    return (((-x).exp() * h - (-x).expm1()) / a).clamp_min(0.0)


def alpha_coefficient(a: float, u: Tensor, x: Tensor) -> Tensor:
    """Coefficient (1 - delta^a)/a of the alpha-divergence, (B, T)."""
    return -(-a * x).expm1() / a


def derive_from_f(f: Callable[[Tensor], Tensor]) -> tuple[Elementwise, Elementwise]:
    """Value and coefficient of an f-divergence from f alone: c = f - delta f', less its value at delta = 1.

    See arXiv 2601.10201, Theorem 4.1.

    Args:
        f: convex, f(1) = 0, elementwise and differentiable in delta, written with torch operations.

    Returns:
        The ``value`` and ``coefficient`` functions of an :class:`Estimator`.
    """

    def value(u: Tensor, x: Tensor) -> Tensor:
        return f((-x).exp())

    def coefficient(u: Tensor, x: Tensor) -> Tensor:
        from torch import ones_like, zeros_like
        from torch.func import jvp

        def own(x: Tensor) -> Tensor:
            # delta f'(delta) = -dF/dx for F(x) = f(exp(-x)).
            value_of_x, slope = jvp(lambda z: f((-z).exp()), (x,), (ones_like(x),))[:2]
            result: Tensor = value_of_x + slope
            return result

        return own(x) - own(zeros_like(x))

    return value, coefficient
