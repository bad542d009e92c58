"""Diagnostics of a KL term. The keys are the same on every rank, and the values are 0 if there are no tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kl_plugins.corrections import effective_sample_size
from kl_plugins.estimators import k3_value
from kl_plugins.kernels.sampled import SampledTerms, log_ratios
from kl_plugins.numerics import Limits, compute_dtype
from kl_plugins.spec.grammar import DEFAULT_BOUND

REDUCTIONS: dict[str, Literal["mean", "max", "pooled"]] = {
    "kl/value": "mean",
    "kl/exact": "mean",
    "kl/reverse_k1": "mean",
    "kl/reverse_k1_is": "mean",
    "kl/log_ratio/mean": "mean",
    "kl/log_ratio/max": "max",
    "kl/coef/mean": "mean",
    "kl/coef/std": "pooled",
    "kl/coef/max": "max",
    "kl/ess": "pooled",
    "kl/weight/mean": "mean",
    "kl/weight/max": "max",
    "kl/cap_frac": "mean",
    "kl/floor_frac": "mean",
    "kl/dead_frac": "mean",
    "kl/disagree": "pooled",
    "kl/trust_region": "mean",
    "kl/active": "mean",
}
"""Every key, and how a host combines it over micro-batches, ranks and the logging window.

``mean``: mean weighted by response tokens. ``max``: the largest value. ``pooled``: a ratio or a standard deviation;
``adapters/metrics.py`` computes it again from combined sums, so that it does not depend on how tokens were split into
micro-batches. ``kl/exact`` exists only if exact values are given.
"""

MEANINGS: dict[str, str] = {
    "kl/value": "mean of k3, an estimate of the reverse KL of each token, nats; never negative; under top: the "
    "same number as kl/exact",
    "kl/exact": "mean of the full-vocabulary KL, nats; under top: mean of the KL over set and bucket, which is a lower "
    "bound; only under a spec with exact terms",
    "kl/reverse_k1": "mean of k1, which is u = log policy - log reference, nats; may be negative",
    "kl/reverse_k1_is": "mean of k1 times the weight, nats",
    "kl/log_ratio/mean": "mean of |u|, nats",
    "kl/log_ratio/max": "largest |u|, nats",
    "kl/coef/mean": "mean coefficient: what multiplies the gradient of a token's log-prob, or the penalty",
    "kl/coef/std": "standard deviation of the coefficient",
    "kl/coef/max": "largest absolute coefficient",
    "kl/ess": "effective share of samples under the weight before a floor: 1 is fresh, near 0 is far from the policy",
    "kl/weight/mean": "mean weight before a floor; 1 in expectation for an exact weight",
    "kl/weight/max": "largest weight before a floor",
    "kl/cap_frac": "share of tokens whose weight or coefficient cap, band or clip changed",
    "kl/floor_frac": "share of tokens whose weight the floor raised",
    "kl/dead_frac": "share of tokens without a gradient although policy and reference differ",
    "kl/disagree": "|mean k1 - kl/value| over kl/value; 0 where that is below 1e-4 nats",
    "kl/trust_region": "mean of rho - 1 - log rho, an estimate of KL(behaviour policy || policy), nats",
    "kl/active": "1 where a term was computed",
}
"""Meaning of each metric, for the documentation and for readers of a log."""

LEAST_KL = 1e-4
"""``kl/disagree`` is 0 if ``kl/value`` is below this (nats), because it would then only compare noise with noise."""

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
