"""Value, coefficient and weight of the sampled terms, and one differentiable function that combines them.

The backward pass multiplies by the closed-form coefficient. Autograd therefore keeps only that coefficient and the mask
(and the weight if there is an exact term), and clamps of the value do not change the gradient.
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
    """Results for each token, all of shape (B, T) and 0 or False outside the mask.

    Attributes:
        value: value of the term, nats, in the compute dtype.
        coefficient: factor of grad log pi(a_t|s_t), in the compute dtype.
        weight: importance weight of the sampled terms, in the compute dtype; of the exact term if there are no others.
        altered: bool, True where the options cap, band or clip changed the weight or the coefficient.
        unraised: the weight before a floor was applied; None without a floor.
        exact_weight: importance weight of the gradient of an exact term; None if the term is not exact.
    """

    value: Tensor
    coefficient: Tensor
    weight: Tensor
    altered: Tensor
    unraised: Tensor | None = None
    exact_weight: Tensor | None = None


def row_of(spec: KLSpec) -> Estimator:
    """Return the estimator that a parsed spec names.

    Raises:
        LookupError: The estimator is not registered in this process.
    """
    row = find_estimator(spec.estimator)
    if row is None:
        raise LookupError(
            f"estimator {spec.estimator!r} is not registered in this process; import the module that registers it"
        )
    return row


def score_terms(spec: KLSpec, u: Tensor, mask: Tensor, exact: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute the values of the estimator and of the future term at each token.

    Args:
        spec: a parsed spec; its estimator, ``future`` and ``bound`` are used.
        u: (B, T) log(policy/reference), nats, 0 outside the mask.
        mask: (B, T) bool.
        exact: (B, T) KL over the whole vocabulary, nats, or None.

    Returns:
        value_t and future_t, both (B, T), in nats, in the dtype of ``u`` and 0 outside the mask. future_t is 0
        everywhere if the spec has no future term.
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


def loss_terms(
    spec: KLSpec, u: Tensor, log_rho: Tensor, mask: Tensor, exact: Tensor | None, remainder: Tensor | None = None
) -> SampledTerms:
    """Compute value, coefficient and weight of a ``@loss`` spec by their closed forms.

    ``docs/specs.md`` has the coefficient of each horizon and correction.

    Args:
        spec: a parsed ``@loss`` spec.
        u: (B, T) log(policy/reference), nats, 0 outside the mask.
        log_rho: (B, T) log(policy/behaviour), nats, 0 outside the mask.
        mask: (B, T) bool.
        exact: (B, T) KL over the whole vocabulary, or over a set of tokens and one bucket, nats, 0 outside the mask;
            None for a spec without exact terms.
        remainder: (B, T) what a sampled token adds to the KL over set and bucket, nats, 0 outside the mask, or None.

    Returns:
        The results at each token, in the dtype of ``u``. For an ``exact`` spec with ``exact`` given, the coefficient
        has only the future part and the remainder; the gradient of the rest flows through ``exact``.
    """
    limits = Limits.of(u.dtype, spec.bound)
    value, future = score_terms(spec, u, mask, exact)
    exact_own = spec.estimator == "exact"
    if exact_own and exact is not None:
        # The gradient of ``exact`` flows through it, so the score coefficient has only what was sampled.
        value, own = limits.saturate(exact.to(u.dtype)).masked_fill(~mask, 0.0), u * 0.0
    else:
        own = limits.saturate(row_of(spec).coefficient(limits.linear(u), limits.exponent(u)))
    weight, altered, unraised = importance_weight(spec, log_rho, mask, limits, one_earlier=exact_own)
    exact_weight = weight if exact_own else None
    future_rest = u * 0.0
    if remainder is not None:
        # Set and bucket are averages over the token, so their weight ends before it; the remainder was drawn with it.
        weight, altered, unraised = importance_weight(spec, log_rho, mask, limits)
        own = limits.linear(remainder.to(u.dtype))
        future_rest = own if spec.future == "exact" else future_rest
    if spec.correction == "decision":
        each = importance_weight(spec, log_rho, mask, limits, one_earlier=spec.future == "exact").value
        later = limits.saturate(each * future + weight * future_rest)
        score = weight * own + future_sum(later, mask, spec.gamma)
    else:
        future = future + future_rest
        if spec.horizon == "sequence":
            own = own + future_sum(future, mask, spec.gamma)
        score = weight * own
    if spec.clip is not None:
        width = held(spec.clip, weight.dtype)
        clipped = weight.clamp(1 - width, 1 + width) * own
        altered = mask & (score < clipped)
        score = score.masked_fill(altered, 0.0)
    return SampledTerms(value, limits.saturate(score).masked_fill(~mask, 0.0), weight, altered, unraised, exact_weight)


class SampledLoss(torch.autograd.Function):
    """Autograd function for value + coefficient * (logp - sg(logp)) + weight * (exact - sg(exact)).

    sg stops the gradient. The sum is not written with tensor operations, because in a 16-bit dtype a large weight would
    round the value away and make the gradient overflow.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        logp: Tensor, exact: Tensor | None, value: Tensor, coefficient: Tensor, weight: Tensor, mask: Tensor
    ) -> Tensor:
        """Return the value (B, T), nats, in the dtype of ``logp``."""
        # The result is a copy, because the host may scale its loss in place.
        return value.clone() if value.dtype == logp.dtype else cast_saturating(value, logp.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the coefficient and the mask for the backward pass, and the weight if there is an exact term."""
        logp, exact, _, coefficient, weight, mask = inputs
        ctx.logp_dtype, ctx.exact_dtype = logp.dtype, None if exact is None else exact.dtype
        ctx.save_for_backward(coefficient, None if exact is None else weight, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        """Multiply the gradient by the coefficient for ``logp`` and by the weight for ``exact``; 0 outside the mask."""
        coefficient, weight, mask = ctx.saved_tensors
        to_exact = None if weight is None else _flow(grad, weight, mask, ctx.exact_dtype)
        return _flow(grad, coefficient, mask, ctx.logp_dtype), to_exact, None, None, None, None


def _flow(grad: Tensor, factor: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    # The mask is applied by masked_fill, because a product with 0 would keep a NaN that arrives at padding.
    return cast_saturating((grad.to(factor.dtype) * factor).masked_fill(~mask, 0.0), dtype)


sampled_loss: Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor], Tensor] = SampledLoss.apply
"""Applies :class:`SampledLoss` to (logp, exact or None, value, coefficient, weight, mask); returns the loss (B, T)."""


def log_ratios(
    logp: Tensor, ref_logp: Tensor, behaviour_logp: Tensor | None, mask: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute the log-ratios u = logp - ref_logp and log rho = logp - behaviour_logp.

    Args:
        logp: (B, T) log-probs of the policy, nats, any float dtype.
        ref_logp: (B, T) log-probs of the reference, nats, any float dtype.
        behaviour_logp: (B, T) log-probs of the behaviour policy, nats, any float dtype; None means log rho = 0.
        mask: (B, T), True on response tokens.
        dtype: the dtype to compute in.

    Returns:
        u and log rho, both (B, T) in ``dtype``, nats, detached and 0 outside the mask.
    """
    u = masked_difference(logp.detach(), ref_logp.detach(), mask, dtype)
    if behaviour_logp is None:
        return u, u * 0.0
    return u, masked_difference(logp.detach(), behaviour_logp.detach(), mask, dtype)
