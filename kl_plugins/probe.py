"""A deeper look at one batch: other estimators, other weights, and the host's own clamps, on the same tokens.

The functions return sums over tokens. Sums of micro-batches and of ranks are added up, and :func:`probe_metrics` makes
the metrics from the totals, so that these do not depend on how the tokens were split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from kl_plugins.corrections import importance_weight
from kl_plugins.kernels.sampled import log_ratios, row_of
from kl_plugins.metric_names import COMPARED, LEVELS, PROBE_SUMS
from kl_plugins.metrics import ALIVE
from kl_plugins.numerics import Limits, compute_dtype
from kl_plugins.spec import KLSpec
from kl_plugins.spec.grammar import DEFAULT_BOUND

ESTIMATORS = tuple(name for name in COMPARED if name != "host")
"""The sampled estimators whose coefficients, without a weight, are compared with the observed spec's."""


class HostTerm(NamedTuple):
    """What the host's own KL does to each token.

    Attributes:
        coefficient: (B, T) factor of grad log pi, or the penalty where the KL is in the reward.
        gradient: (B, T) derivative of the host's KL by the token's log-prob, which is 0 where a clamp holds its value;
            None if the host's KL is not a function that can be called.
    """

    coefficient: Tensor
    gradient: Tensor | None


def host_term(host_kl: Callable[[Tensor], Tensor], logp: Tensor, *, in_loss: bool) -> HostTerm:
    """Call a host's own KL function on a copy of the log-probs, and differentiate it.

    Args:
        host_kl: gives the host's KL (B, T) of policy log-probs (B, T); elementwise.
        logp: (B, T) log-probs of the policy, nats.
        in_loss: whether the host differentiates its KL; otherwise its value is the penalty.

    Returns:
        What the host's KL does to each token, detached.
    """
    with torch.enable_grad():
        leaf = logp.detach().clone().requires_grad_()
        value = host_kl(leaf)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return HostTerm(gradient if in_loss else value.detach(), gradient)


@torch.no_grad()
def probe_sums(
    coefficient: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    *,
    behaviour_logp: Tensor | None = None,
    host: HostTerm | None = None,
    log_mass: Tensor | None = None,
) -> dict[str, Tensor]:
    """Compute the sums of one micro-batch.

    Args:
        coefficient: (B, T) of the observed spec.
        logp: (B, T) log-probs of the policy now, nats.
        ref_logp: (B, T) log-probs of the reference, nats.
        mask: (B, T), True on the tokens that count.
        behaviour_logp: (B, T) log-probs that weights divide by, nats; None if the data are the policy's own.
        host: the host's own term; None if it is not known.
        log_mass: (B, T) log-prob of each token under the whole policy minus the one under the truncated policy that it
            was sampled from, nats, which is the log of the kept probability mass; None if it is not known.

    Returns:
        0-d tensors by key, float64 (float32 on devices without it). The keys depend on which arguments were given, and
        not on their values.
    """
    mask, dtype = mask.bool(), compute_dtype(logp, ref_logp)
    wide = torch.float32 if mask.device.type == "mps" else torch.float64
    limits = Limits.of(dtype, DEFAULT_BOUND)
    u, log_rho = log_ratios(logp, ref_logp, behaviour_logp, mask, dtype)

    def total(x: Tensor) -> Tensor:
        return x.to(wide).masked_fill(~mask, 0.0).sum()

    def compared(name: str, other: Tensor) -> Iterator[tuple[str, Tensor]]:
        other = limits.saturate(other.to(dtype)).to(wide).masked_fill(~mask, 0.0)
        yield f"{PROBE_SUMS}{name}/dot", total(own * other)
        yield f"{PROBE_SUMS}{name}/square", total(other.square())

    own = coefficient.to(wide).masked_fill(~mask, 0.0)
    sums = {f"{PROBE_SUMS}tokens": mask.sum().to(wide), f"{PROBE_SUMS}square": total(own.square())}
    for name in ESTIMATORS:
        sums |= compared(name, row_of(KLSpec(name, "loss")).coefficient(limits.linear(u), limits.exponent(u)))
    for level in LEVELS:
        weight = importance_weight(KLSpec("k2", "loss", correction=level), log_rho, mask, limits).value.to(wide)
        sums |= {f"{PROBE_SUMS}{level}/weight": total(weight), f"{PROBE_SUMS}{level}/square": total(weight.square())}
    if host is not None:
        sums |= compared("host", host.coefficient)
        if host.gradient is not None:
            sums[f"{PROBE_SUMS}host/dead"] = total((host.gradient == 0) & (u.abs() > ALIVE))
    if log_mass is not None:
        known = torch.isfinite(log_mass) & mask
        mass = limits.exponent(log_mass.to(dtype)).exp().masked_fill(~known, 0.0)
        sums |= {f"{PROBE_SUMS}mass/sum": total(mass), f"{PROBE_SUMS}mass/tokens": total(known)}
    return sums


def probe_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Turn the totals of :func:`probe_sums` into metrics.

    Args:
        sums: totals by key; other keys are ignored.

    Returns:
        The metrics by key. A metric that has no value is left out: a cosine where a coefficient is 0 on all tokens,
        which is so as long as the policy equals the reference.
    """
    given = {key.removeprefix(PROBE_SUMS): value for key, value in sums.items() if key.startswith(PROBE_SUMS)}
    tokens = given.get("tokens", 0.0)
    if tokens <= 0:
        return {}
    found = {}
    for name in COMPARED:
        square, own = given.get(f"{name}/square", 0.0), given["square"]
        if own > 0 and square > 0:
            cosine = given[f"{name}/dot"] / (square**0.5 * own**0.5)
            found[f"kl/probe/{name}/cosine"] = min(max(cosine, -1.0), 1.0)
            found[f"kl/probe/{name}/norm_ratio"] = square**0.5 / own**0.5
    for level in LEVELS:
        weight, square = given[f"{level}/weight"], given[f"{level}/square"]
        found[f"kl/probe/{level}/weight"] = weight / tokens
        found[f"kl/probe/{level}/ess"] = min(weight**2 / (tokens * square), 1.0) if square > 0 else 0.0
    if "host/dead" in given:
        found["kl/probe/host/dead_frac"] = given["host/dead"] / tokens
    if given.get("mass/tokens", 0.0) > 0:
        found["kl/probe/kept_mass"] = given["mass/sum"] / given["mass/tokens"]
    return found
