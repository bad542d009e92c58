"""What a spec would do on data that train under something else: its metrics and coefficient, without a gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kl_plugins.metrics import penalty_metrics
from kl_plugins.penalty import kl_penalty
from kl_plugins.spec import KLSpec
from kl_plugins.term import kl_term

OBSERVED = "kl/observed"
"""Metric that says that a spec was not applied, and on which share of the response tokens it was computed."""


class Observed(NamedTuple):
    """The measurement of one micro-batch.

    Attributes:
        metrics: 0-d tensors by key; those of the spec, and :data:`OBSERVED`.
        coefficient: (B, T) detached factor of grad log pi, or the penalty of a score spec; 0 outside ``kept``. Under
            ``top:`` it has the remainder and later terms; the gradient of set and bucket comes beside it.
        kept: (B, T) bool, the response tokens on which the spec was computed.
    """

    metrics: dict[str, Tensor]
    coefficient: Tensor
    kept: Tensor


@torch.no_grad()
def observed(
    spec: KLSpec,
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    *,
    old_logp: Tensor | None = None,
    sampler_logp: Tensor | None = None,
    exact: Tensor | None = None,
    remainder: Tensor | None = None,
) -> Observed:
    """Compute the metrics of a spec that can be observed, of any placement, and change nothing.

    Tokens on which a number that the spec needs is not finite are left out, because an observation must not stop a run.
    If the log-probs for the spec's weight or the exact values are missing, all tokens are left out.

    Args:
        spec: a parsed spec: sampled, or ``exact@loss`` with ``top:``.
        logp: (B, T) log-probs of the policy now, nats.
        ref_logp: (B, T) log-probs of the reference, nats.
        mask: (B, T), True on response tokens.
        old_logp: (B, T) log-probs of the trainer's own policy at rollout time, or None. A penalty is computed from
            them, because a host computes it during the rollout; without them, from ``logp``.
        sampler_logp: (B, T) log-probs that the inference engine sampled with, or None.
        exact: (B, T) KL over the kept tokens and one bucket, nats, for a spec with ``top:``.
        remainder: (B, T) contribution of the sampled token that set and bucket leave out, nats, for the same specs.

    Returns:
        The measurement. Everything in it is detached; the arguments are not changed.
    """
    logp, ref_logp, mask = logp.detach(), ref_logp.detach(), mask.bool()
    kept = mask & torch.isfinite(logp) & torch.isfinite(ref_logp)
    old, sampler = (None if t is None else t.detach() for t in (old_logp, sampler_logp))
    if spec.needs_behaviour:
        divisor = {"old": old, "sampler": sampler}.get(spec.behaviour or "", old if sampler is None else sampler)
        kept = kept & (torch.isfinite(divisor) if divisor is not None else torch.zeros_like(mask))
        if divisor is None:  # no token is kept, so these numbers reach no result
            old, sampler = logp, logp
    old, sampler = (None if t is None else torch.where(torch.isfinite(t), t, logp.to(t)) for t in (old, sampler))
    states: dict[str, Tensor] = {}
    if spec.needs_exact:
        if exact is None or remainder is None:
            exact = remainder = torch.full_like(logp, torch.nan)
        kept = kept & torch.isfinite(exact) & torch.isfinite(remainder)
        states = {"exact": exact.detach(), "remainder": remainder.detach()}
    if spec.placement == "loss":
        term = kl_term(spec, logp, ref_logp, kept, old_logp=old, sampler_logp=sampler, **states)
        metrics, coefficient = term.metrics, term.coefficient
    else:
        coefficient = kl_penalty(spec, logp if old is None else old, ref_logp, kept)
        metrics = penalty_metrics(coefficient, logp, ref_logp, sampler if old is None else old, kept)
    share = kept.sum() / mask.sum().clamp_min(1)
    share = torch.where(mask.any(), share, torch.ones_like(share))
    return Observed({**metrics, OBSERVED: share.to(metrics["kl/active"])}, coefficient, kept)
