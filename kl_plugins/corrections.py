"""Importance weights on the KL term: token, prefix, sequence, with floor, cap, band and norm.

For the theory see arXiv 2512.21852 and 2512.02556 (DeepSeek-V3.2's token ratio). :mod:`kl_plugins.spec.target` states
which gradient each level estimates, and tests prove it by enumeration.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, finfo
from torch.nn.functional import pad

from kl_plugins.numerics import Limits, held
from kl_plugins.spec import KLSpec


class Weight(NamedTuple):
    """An importance weight, the tokens where cap or band changed it, and its value before a floor raised it.

    Attributes:
        value: (B, T), 0 outside the mask.
        altered: (B, T) bool, True where cap or band changed the weight.
        unraised: (B, T) weight as it would be without ``floor:``; None if the spec has no floor.
    """

    value: Tensor
    altered: Tensor
    unraised: Tensor | None


def importance_weight(
    spec: KLSpec, log_rho: Tensor, mask: Tensor, limits: Limits, *, one_earlier: bool = False
) -> Weight:
    """Compute the spec's importance weight for each token.

    Args:
        spec: a parsed spec, which names the level (``is:``), ``floor``, ``cap``, ``band`` and ``norm``.
        log_rho: (B, T) log(policy/behaviour) per token, nats, 0 outside the mask.
        mask: (B, T) bool, True on response tokens.
        limits: bounds of this computation.
        one_earlier: whether to leave out the token itself (``rho_{1:t-1}``), for terms that are already averaged over
            it. The token weight of such a term is 1, and floor, cap, band and norm do not change it.

    Returns:
        The weight: ``rho_t``, ``rho_{1:t}`` (``prefix``, ``decision``) or ``rho_{1:T}``, 1 for ``none``.
    """
    level = "token" if spec.clip is not None else spec.correction
    if level == "token" and one_earlier:
        return Weight(mask.to(log_rho.dtype), mask & False, None)
    if level == "none":
        exponent = log_rho * 0.0
    elif level == "token":
        exponent = log_rho
    elif level == "sequence":
        exponent = log_rho.sum(-1, keepdim=True).expand_as(log_rho)
    else:
        exponent = log_rho.cumsum(-1)
        if one_earlier and exponent.numel():
            # The sum is shifted by one token. Subtracting the own term instead would lose digits if that term is huge.
            exponent = pad(exponent[..., :-1], (1, 0))
    return _treat(spec, limits.exponent(exponent).exp().masked_fill(~mask, 0.0), mask)


def _treat(spec: KLSpec, weight: Tensor, mask: Tensor) -> Weight:
    altered, unraised = mask & False, None
    if spec.floor is not None:
        unraised, weight = weight, weight.clamp_min(spec.floor).masked_fill(~mask, 0.0)
    if spec.cap is not None:
        cap = held(spec.cap, weight.dtype)
        altered = altered | (weight > cap)
        weight = weight.clamp_max(cap)
        unraised = None if unraised is None else unraised.clamp_max(cap)
    if spec.band is not None:
        low, high = (held(edge, weight.dtype) for edge in spec.band)
        outside = mask & ((weight < low) | (weight > high))
        altered, weight = altered | outside, weight.masked_fill(outside, 0.0)
    if spec.norm:
        count = mask.sum().clamp_min(1)
        # The lower limit avoids 0/0 if a band set all weights to 0; the result is then 0.
        weight = weight / (weight.sum() / count).clamp_min(finfo(weight.dtype).tiny)
    return Weight(weight, altered, unraised)


def effective_sample_size(weight: Tensor, mask: Tensor) -> Tensor:
    """Return the effective sample size of the response tokens as a share of their number: (sum w)^2 / (n sum w^2).

    It is 1 for equal weights, 1/n if one token has all of the weight, and 0 without tokens.

    See Kong 1992; Owen 2013, "Monte Carlo theory, methods and examples", chapter 9.

    Args:
        weight: (B, T), 0 outside the mask.
        mask: (B, T) bool.

    Returns:
        0-d tensor in [0, 1].
    """
    if not weight.numel():
        return weight.sum()
    tiny = finfo(weight.dtype).tiny
    scaled = weight / weight.amax().clamp_min(tiny)  # squares of large weights must not overflow
    return scaled.sum().square() / (mask.sum() * scaled.square().sum()).clamp_min(tiny)
