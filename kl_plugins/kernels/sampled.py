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
from kl_plugins.numerics import Limits, cast_saturating, masked_difference
from kl_plugins.spec import KLSpec


class SampledTerms(NamedTuple):
    """Per-token results in the compute dtype, all (B, T) and 0 (or False) outside the mask."""

    value: Tensor
    coefficient: Tensor
    weight: Tensor
    altered: Tensor


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

    See README, "Specs", for the coefficient of each horizon and correction.

    Args:
        spec: a parsed ``@loss`` spec.
        u: (B, T) log(policy/reference), nats, 0 outside the mask.
        log_rho: (B, T) log(policy/behaviour), nats, 0 outside the mask.
        mask: (B, T) bool.
        exact: (B, T) full-vocabulary KL, nats, 0 outside the mask, or None.

    Returns:
        Value, coefficient, weight and where cap, band or clip acted.
    """
    limits = Limits.of(u.dtype, spec.bound)
    value, future = score_terms(spec, u, mask, exact)
    exact_own = spec.estimator == "exact"
    if exact_own and exact is not None:
        # Its own gradient flows through ``exact`` itself, so the score coefficient holds the future part only.
        value, own = exact.to(u.dtype).masked_fill(~mask, 0.0), u * 0.0
    else:
        own = limits.saturate(row_of(spec).coefficient(limits.linear(u), limits.exponent(u)))
    weight, altered = importance_weight(spec, log_rho, mask, limits, one_earlier=exact_own)
    if spec.correction == "decision":
        each = importance_weight(spec, log_rho, mask, limits, one_earlier=spec.future == "exact").value
        score = weight * own + future_sum(limits.saturate(each * future), mask, spec.gamma)
    else:
        if spec.horizon == "sequence":
            own = own + future_sum(future, mask, spec.gamma)
        score = weight * own
    if spec.clip is not None:
        clipped = weight.clamp(1 - spec.clip, 1 + spec.clip) * own
        altered = mask & (score < clipped)
        score = score.masked_fill(altered, 0.0)
    return SampledTerms(value, limits.saturate(score).masked_fill(~mask, 0.0), weight, altered)


class SampledLoss(torch.autograd.Function):
    """loss = value + coefficient * (logp - logp.detach()), with the closed-form coefficient as its backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logp: Tensor, value: Tensor, coefficient: Tensor, mask: Tensor) -> Tensor:
        """Return the value, in the dtype of ``logp``."""
        return cast_saturating(value, logp.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep the coefficient and the mask, nothing else."""
        logp, _, coefficient, mask = inputs
        ctx.logp_dtype = logp.dtype
        ctx.save_for_backward(coefficient, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Multiply by the coefficient on response tokens; 0 elsewhere."""
        coefficient, mask = ctx.saved_tensors
        # masked_fill, not a product: an upstream NaN at padding must not come back as NaN * 0.
        flow = (grad.to(coefficient.dtype) * coefficient).masked_fill(~mask, 0.0)
        return cast_saturating(flow, ctx.logp_dtype), None, None, None


sampled_loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = SampledLoss.apply
""":class:`SampledLoss` as the function it is: (logp, value, coefficient, mask) -> loss, all (B, T)."""


def log_ratios(
    logp: Tensor, ref_logp: Tensor, behaviour_logp: Tensor | None, mask: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Log-ratios u = logp - ref_logp and log rho = logp - behaviour_logp, nats, detached, 0 outside the mask."""
    u = masked_difference(logp.detach(), ref_logp.detach(), mask, dtype)
    if behaviour_logp is None:
        return u, u * 0.0
    return u, masked_difference(logp.detach(), behaviour_logp.detach(), mask, dtype)
