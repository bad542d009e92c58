"""Diagnostics of a KL term. The keys are the same on every rank, and the values are 0 if there are no tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from kl_plugins.corrections import effective_sample_size
from kl_plugins.estimators import k3_value
from kl_plugins.kernels.sampled import SampledTerms, log_ratios
from kl_plugins.metric_names import LEAST_KL, MEANINGS, REDUCTIONS
from kl_plugins.numerics import Limits, compute_dtype
from kl_plugins.spec.grammar import DEFAULT_BOUND

__all__ = ["ALIVE", "LEAST_KL", "MEANINGS", "REDUCTIONS", "penalty_metrics", "term_metrics"]

ALIVE = 1e-6
"""Log-ratios below this (nats) count as 0 for ``kl/dead_frac``."""


def term_metrics(
    terms: SampledTerms,
    u: Tensor,
    log_rho: Tensor,
    mask: Tensor,
    exact: Tensor | None = None,
    *,
    bucket: bool = False,
) -> dict[str, Tensor]:
    """Compute the diagnostics of one ``kl_term`` call.

    Args:
        terms: closed forms of the term.
        u: (B, T) log(policy/reference), nats, 0 outside the mask.
        log_rho: (B, T) log(policy/behaviour), nats, 0 outside the mask.
        mask: (B, T) bool.
        exact: (B, T) full-vocabulary KL, nats, or None.
        bucket: whether ``exact`` is the KL over a set of tokens and one bucket. If so, ``kl/value`` is its mean.

    Returns:
        0-d tensors by key; see :data:`REDUCTIONS`. ``log_ratio`` is |u|. ``trust_region`` estimates
        KL(behaviour || policy) from ``rho - 1 - log rho``. ``ess``, ``weight/mean``, ``weight/max`` and
        ``reverse_k1_is`` use the weight before a floor has raised it: they describe the data, and a floor would hide
        how far the data are from the policy. The mean is 1 in expectation for an exact weight. ``floor_frac`` is the
        share of tokens whose weight the floor raised.
    """
    limits = Limits.of(u.dtype, DEFAULT_BOUND)
    count = mask.sum().clamp_min(1)

    def mean(x: Tensor) -> Tensor:
        return x.masked_fill(~mask, 0).sum() / count

    coefficient = terms.coefficient
    weight = terms.weight if terms.unraised is None else terms.unraised
    coefficient_mean = mean(coefficient)
    k1_mean = mean(u)
    kl_mean = mean(terms.value if bucket else k3_value(limits.linear(u), limits.exponent(u)))
    trust_region = k3_value(limits.linear(-log_rho), limits.exponent(-log_rho))
    dead = (coefficient == 0) & (u.abs() > ALIVE)
    if terms.exact_weight is not None:
        dead = dead & (terms.exact_weight == 0)
    spread = (coefficient - coefficient_mean).masked_fill(~mask, 0)
    # The scaling keeps the squares of very large coefficients finite.
    scale = spread.abs().amax().clamp_min(1e-30) if spread.numel() else torch.ones_like(count, dtype=u.dtype)
    found = {
        "kl/value": kl_mean,
        "kl/reverse_k1": k1_mean,
        "kl/reverse_k1_is": mean(limits.saturate(weight * u)),
        "kl/log_ratio/mean": mean(u.abs()),
        "kl/log_ratio/max": _largest(u),
        "kl/coef/mean": coefficient_mean,
        "kl/coef/std": (spread / scale).square().sum().div(count).sqrt() * scale,
        "kl/coef/max": _largest(coefficient),
        "kl/ess": effective_sample_size(weight, mask),
        "kl/weight/mean": mean(weight),
        "kl/weight/max": _largest(weight),
        "kl/cap_frac": mean(terms.altered.to(u.dtype)),
        "kl/floor_frac": mean((terms.weight > weight).to(u.dtype)),
        "kl/dead_frac": mean(dead.to(u.dtype)),
        "kl/disagree": ((k1_mean - kl_mean).abs() / kl_mean.clamp_min(LEAST_KL)).masked_fill(kl_mean < LEAST_KL, 0.0),
        "kl/trust_region": mean(trust_region),
        "kl/active": mask.any().to(u.dtype) * 0 + 1,
    }
    if exact is not None:
        found["kl/exact"] = mean(exact.detach().to(u.dtype))
    return found


def penalty_metrics(
    penalty: Tensor, logp: Tensor, ref_logp: Tensor, behaviour_logp: Tensor | None, mask: Tensor
) -> dict[str, Tensor]:
    """Compute the diagnostics of a penalty under the same keys. The coefficient is the penalty, and the weight is 1.

    Args:
        penalty: (B, T) penalty per unit of beta, nats.
        logp: (B, T) log-probs of the current policy, nats.
        ref_logp: (B, T) log-probs of the reference, nats.
        behaviour_logp: (B, T) log-probs at rollout, nats, or None.
        mask: (B, T), True on response tokens.

    Returns:
        0-d tensors by key; see :data:`REDUCTIONS`.
    """
    mask, dtype = mask.bool(), compute_dtype(logp, ref_logp)
    u, log_rho = log_ratios(logp, ref_logp, behaviour_logp, mask, dtype)
    penalty = penalty.to(dtype).masked_fill(~mask, 0.0)
    return term_metrics(SampledTerms(penalty, penalty, mask.to(dtype), mask & False), u, log_rho, mask)


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax() if x.numel() else x.sum()
