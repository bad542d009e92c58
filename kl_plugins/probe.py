"""A deeper look at one batch: other estimators, other weights, and the host's own clamps, on the same tokens.

The functions return sums over tokens. Sums of micro-batches and of ranks are added up, and :func:`probe_metrics` makes
the metrics from the totals, so that these do not depend on how the tokens were split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kl_plugins.corrections import importance_weight
from kl_plugins.kernels.exact.draws import drawn_part
from kl_plugins.kernels.sampled import log_ratios, row_of
from kl_plugins.metric_names import COMPARED, LEVELS, PROBE_SUMS
from kl_plugins.metrics import ALIVE
from kl_plugins.numerics import LINEAR_LIMIT, Limits, compute_dtype
from kl_plugins.spec import KLSpec
from kl_plugins.spec.grammar import DEFAULT_BOUND

if TYPE_CHECKING:
    from kl_plugins.reference import RefTopK

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


class Cells(NamedTuple):
    """How two gradients by the logits of a state lie to each other, for specs with ``top:``.

    The logits of a state are looked at in k + 1 cells: one for each kept token, and the bucket of all others, where the
    derivative is that by a common shift of their logits. The two gradients are that of the KL over these cells, and
    that of the log-prob of the drawn token, which every sampled term multiplies by its coefficient.

    Attributes:
        kl: (...) squared norm of the gradient of the KL.
        both: (...) scalar product of the two.
        label: (...) squared norm of the gradient of the drawn token's log-prob.
    """

    kl: Tensor
    both: Tensor
    label: Tensor


@torch.no_grad()
def cells_of(log_probs: Tensor, labels: Tensor, reference: RefTopK) -> Cells:
    """Compute the products of the gradients of each state.

    With probabilities p of the policy and log-ratios u = log(p / r) of the cells, the gradient of the KL is
    p (u - sum p u), and that of the log-prob of the drawn token is e - p, where e is 1 in the token's cell. If the
    reference has draws, what they add to the KL has the gradient c (e - p), where e is 1 in the bucket and c is the sum
    of their coefficients.

    Args:
        log_probs: (..., k) log-probs of ``reference.tokens`` under the policy, nats; (..., k + m) with draws.
        labels: (...) int64, the drawn tokens.
        reference: of the same states.

    Returns:
        The products, float32 (float64 for float64 log-probs), detached.
    """
    k, draws = reference.ids.shape[-1], reference.draws
    ours, tail = log_probs[..., :k].double().clamp_max(0.0), reference.log_tail.double()[..., None]
    inside = reference.ids == labels[..., None]
    bucket = (1.0 - ours.exp().sum(-1, keepdim=True)).clamp_min(0.0).masked_fill(tail == -torch.inf, 0.0)
    p = torch.cat([ours.exp(), bucket], -1)
    u = torch.cat([ours - reference.logp.double(), bucket.log() - tail], -1)
    u = u.masked_fill(p == 0, 0.0).clamp(-LINEAR_LIMIT, LINEAR_LIMIT)
    of_kl = p * (u - (p * u).sum(-1, keepdim=True))
    if draws is not None:
        level = u[..., -1].reshape(-1)
        everywhere = torch.ones_like(level, dtype=torch.bool)
        added = drawn_part(log_probs[..., k:].reshape(len(level), -1), draws.rows(), level, everywhere)
        in_bucket = torch.zeros_like(p).index_fill(-1, torch.tensor(k, device=p.device), 1.0)
        of_kl = of_kl + added.double().view(*p.shape[:-1], 1) * (in_bucket - p)
    of_label = torch.cat([inside, ~inside.any(-1, keepdim=True)], -1).double() - p
    products = of_kl.square(), of_kl * of_label, of_label.square()
    return Cells(*(product.sum(-1).to(log_probs.dtype) for product in products))


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
    spec: KLSpec | None = None,
    cells: Cells | None = None,
) -> dict[str, Tensor]:
    """Compute the sums of one micro-batch.

    The vectors that are compared have one coefficient per token. Where the observed spec has ``top:``, its gradient has
    a direction of its own in each state, and the vectors have the k + 1 cells of :class:`Cells` per token.

    Args:
        coefficient: (B, T) of the observed spec.
        logp: (B, T) log-probs of the policy now, nats.
        ref_logp: (B, T) log-probs of the reference, nats.
        mask: (B, T), True on the tokens that count.
        behaviour_logp: (B, T) log-probs that weights divide by, nats; None if the data are the policy's own.
        host: the host's own term; None if it is not known.
        log_mass: (B, T) log-prob of each token under the whole policy minus the one under the truncated policy that it
            was sampled from, nats, which is the log of the kept probability mass; None if it is not known.
        spec: the observed spec, if it has ``top:``.
        cells: (B, T) each; given together with ``spec``.

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
        yield f"{PROBE_SUMS}{name}/dot", total(along * other)
        yield f"{PROBE_SUMS}{name}/square", total(label * other.square())

    own = coefficient.to(wide).masked_fill(~mask, 0.0)
    along, label, square = own, torch.ones_like(own), own.square()
    if spec is not None and cells is not None:
        kl, both, label = (part.to(wide).masked_fill(~mask, 0.0) for part in cells)
        # The weight of set and bucket ends before the token, as in the loss.
        weight = importance_weight(spec, log_rho, mask, Limits.of(dtype, spec.bound), one_earlier=True).value.to(wide)
        along = weight * both + own * label
        square = weight.square() * kl + 2 * weight * own * both + own.square() * label
    sums = {f"{PROBE_SUMS}tokens": mask.sum().to(wide), f"{PROBE_SUMS}square": total(square)}
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
