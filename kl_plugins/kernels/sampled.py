"""Value, coefficient and weight of the sampled terms in one differentiable function.

The backward pass knows the closed-form coefficient, so nothing but that coefficient (and the mask) is kept,
and no clamp of a value can reach the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kl_plugins.corrections import importance_weight
from kl_plugins.estimators import Estimator, find_estimator, k3_value
from kl_plugins.horizon import future_sum
from kl_plugins.numerics import Limits, cast_saturating, held, masked_difference
from kl_plugins.spec import KLSpec


class SampledTerms(NamedTuple):
    """Per-token results in the compute dtype, all (B, T) and 0 (or False) outside the mask.

    ``altered`` says where cap, band or clip acted; ``unraised`` is the weight before a floor, None without one.
    """

    value: Tensor
    coefficient: Tensor
    weight: Tensor
    altered: Tensor
    unraised: Tensor | None = None


def row_of(spec: KLSpec) -> Estimator:
    """The table row that a parsed spec names."""
    row = find_estimator(spec.estimator)
    if row is None:
        raise LookupError(
            f"estimator {spec.estimator!r} is not registered in this process; import the module that does"
        )
    return row


def score_terms(spec: KLSpec, u: Tensor, mask: Tensor, exact: Tensor | None) -> tuple[Tensor, Tensor]:
    """Value of the own term and of the future term for each token, nats, 0 outside the mask.

    Args:
        spec: names estimator, ``future`` and ``bound``.
        u: (B, T) log(policy/reference), nats, 0 outside the mask.
        mask: (B, T) bool.
        exact: (B, T) full-vocabulary KL, or None.

    Returns:
        value_t and future_t (zeros without a future term).
    """
    limits = Limits.of(u.dtype, spec.bound)
    linear, exponent = limits.linear(u), limits.exponent(u)
    value = limits.saturate(row_of(spec).value(linear, exponent))
    future = value * 0.0
    if spec.future == "k1":
        future = linear
    elif spec.future == "k3":
        future = k3_value(linear, exponent)
    elif spec.future == "own":
        future = value
    elif spec.future == "exact" and exact is not None:
        future = limits.saturate(exact.to(u.dtype))
    return value.masked_fill(~mask, 0.0), future.masked_fill(~mask, 0.0)


def loss_terms(spec: KLSpec, u: Tensor, log_rho: Tensor, mask: Tensor, exact: Tensor | None) -> SampledTerms:
    """Closed forms of a ``@loss`` spec.

    See ``docs/specs.md`` for the coefficient of each horizon and correction.

    Args:
        spec: a parsed ``@loss`` spec.
        u: (B, T) log(policy/reference), nats, 0 outside the mask.
        log_rho: (B, T) log(policy/behaviour), nats, 0 outside the mask.
        mask: (B, T) bool.
        exact: (B, T) full-vocabulary KL, nats, 0 outside the mask, or None.

    Returns:
        Value, coefficient, weight, where cap, band or clip acted, and the weight before a floor.
    """
    limits = Limits.of(u.dtype, spec.bound)
    value, future = score_terms(spec, u, mask, exact)
    exact_own = spec.estimator == "exact"
    if exact_own and exact is not None:
        # Its own gradient flows through ``exact`` itself, so the score coefficient holds the future part only.
        value, own = limits.saturate(exact.to(u.dtype)).masked_fill(~mask, 0.0), u * 0.0
    else:
        own = limits.saturate(row_of(spec).coefficient(limits.linear(u), limits.exponent(u)))
    weight, altered, unraised = importance_weight(spec, log_rho, mask, limits, one_earlier=exact_own)
    if spec.correction == "decision":
        each = importance_weight(spec, log_rho, mask, limits, one_earlier=spec.future == "exact").value
        score = weight * own + future_sum(limits.saturate(each * future), mask, spec.gamma)
    else:
        if spec.horizon == "sequence":
            own = own + future_sum(future, mask, spec.gamma)
        score = weight * own
    if spec.clip is not None:
        width = held(spec.clip, weight.dtype)
        clipped = weight.clamp(1 - width, 1 + width) * own
        altered = mask & (score < clipped)
        score = score.masked_fill(altered, 0.0)
    return SampledTerms(value, limits.saturate(score).masked_fill(~mask, 0.0), weight, altered, unraised)


class SampledLoss(torch.autograd.Function):
    """loss = value + coefficient * (logp - sg(logp)) + weight * (exact - sg(exact)), by closed forms.

    One function rather than the sum: in 16 bits a large weight would swallow the value and overflow the gradient.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        logp: Tensor, exact: Tensor | None, value: Tensor, coefficient: Tensor, weight: Tensor, mask: Tensor
    ) -> Tensor:
        """Return the value, in the dtype of ``logp``."""
        # Never the input itself: the host may scale its loss in place.
        return value.clone() if value.dtype == logp.dtype else cast_saturating(value, logp.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the coefficient and the mask; the weight only where an exact term needs it."""
        logp, exact, _, coefficient, weight, mask = inputs
        ctx.logp_dtype, ctx.exact_dtype = logp.dtype, None if exact is None else exact.dtype
        ctx.save_for_backward(coefficient, None if exact is None else weight, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        """Multiply by the coefficient (the weight for ``exact``) on response tokens; 0 elsewhere."""
        coefficient, weight, mask = ctx.saved_tensors
        to_exact = None if weight is None else _flow(grad, weight, mask, ctx.exact_dtype)
        return _flow(grad, coefficient, mask, ctx.logp_dtype), to_exact, None, None, None, None


def _flow(grad: Tensor, factor: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    # masked_fill, not a product: an upstream NaN at padding must not come back as NaN * 0.
    return cast_saturating((grad.to(factor.dtype) * factor).masked_fill(~mask, 0.0), dtype)


sampled_loss: Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor], Tensor] = SampledLoss.apply
""":class:`SampledLoss` as the function it is: (logp, exact or None, value, coefficient, weight, mask) -> loss."""


def log_ratios(
    logp: Tensor, ref_logp: Tensor, behaviour_logp: Tensor | None, mask: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Log-ratios u = logp - ref_logp and log rho = logp - behaviour_logp, nats, detached, 0 outside the mask."""
    u = masked_difference(logp.detach(), ref_logp.detach(), mask, dtype)
    if behaviour_logp is None:
        return u, u * 0.0
    return u, masked_difference(logp.detach(), behaviour_logp.detach(), mask, dtype)
