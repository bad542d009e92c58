"""The KL term as a written surrogate: plain torch, one token at a time, gradients by autograd alone.

Slow and obvious on purpose. Inputs are tame: no bound, no saturation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kl_plugins import KLSpec

F: dict[str, Callable[[Tensor], Tensor]] = {
    "jeffreys": lambda d: (d - 1) * d.log(),
    "jsd": lambda d: (d * (2 * d / (1 + d)).log() - ((1 + d) / 2).log()) / 2,
    "hellinger": lambda d: (1 - d.sqrt()) ** 2,
    "chi2": lambda d: (d - 1) ** 2 / 2,
    "alpha-0.5": lambda d: (d**0.5 - d / 2 - 0.5) / -0.25,
    "alpha-1": lambda d: d * d.log() - d + 1,
    "alpha-2": lambda d: (d**2 - 2 * d + 1) / 2,
    "alpha-3": lambda d: (d**3 - 3 * d + 2) / 6,
}
"""f(delta) with f(1) = f'(1) = 0, so that the gradient of ratio * f(delta) is the coefficient without a constant."""


def value_of(estimator: str, u: Tensor) -> Tensor:
    if estimator in F:
        return F[estimator]((-u).exp())
    k3 = (-u).exp() - 1 + u
    return {"k1": u, "k2": u**2 / 2, "k3": k3, "k3+": k3, "abs": u.abs()}[estimator]


def own_surrogate(estimator: str, logp: Tensor, ref: Tensor) -> Tensor:
    """A live expression whose slope is the own coefficient, as the literature writes it."""
    u = logp - ref
    if estimator in F:
        return (logp - logp.detach()).exp() * F[estimator]((-u).exp())
    return value_of("k2" if estimator == "k3+" else estimator, u)


def weights_of(spec: KLSpec, log_rho: Tensor, mask: Tensor, *, one_earlier: bool) -> Tensor:
    weights = torch.zeros_like(log_rho)
    for b in range(mask.shape[0]):
        positions = [t for t in range(mask.shape[1]) if mask[b, t]]
        for n, t in enumerate(positions):
            upto = {
                "none": [],
                "token": [t],
                "prefix": positions[: n + (not one_earlier)],
                "decision": positions[: n + (not one_earlier)],
                "sequence": positions,
            }[spec.correction]
            weights[b, t] = sum(log_rho[b, i] for i in upto) if upto else 0.0
            weights[b, t] = weights[b, t].exp()
            if spec.floor is not None:
                weights[b, t] = max(weights[b, t].item(), spec.floor)
            if spec.cap is not None:
                weights[b, t] = min(weights[b, t].item(), spec.cap)
            if spec.band is not None and not spec.band[0] <= weights[b, t] <= spec.band[1]:
                weights[b, t] = 0.0
    anything_left = bool((weights != 0).any())
    return weights / weights[mask].mean() if spec.norm and anything_left else weights


def surrogate(
    spec: KLSpec,
    logp: Tensor,
    ref: Tensor,
    behaviour: Tensor,
    mask: Tensor,
    exact: Tensor | None = None,
    remainder: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-token surrogate losses (their values mean nothing, their gradients all) and the detached own values.

    With ``top:`` the remainder takes the weight that holds its token, whatever the weight of the exact part is.
    """
    rho = logp - behaviour
    own_is_exact = spec.estimator == "exact"
    rest = torch.zeros_like(logp) if spec.top is None or remainder is None else remainder
    sampled = weights_of(spec, rho.detach(), mask, one_earlier=False)
    weight = weights_of(spec, rho.detach(), mask, one_earlier=own_is_exact)
    if own_is_exact and spec.correction == "token":
        weight = torch.ones_like(weight)
    each = weights_of(spec, rho.detach(), mask, one_earlier=spec.future == "exact")
    losses, values = torch.zeros_like(logp), torch.zeros_like(logp)
    u = (logp - ref).detach()
    for b in range(mask.shape[0]):
        positions = [t for t in range(mask.shape[1]) if mask[b, t]]
        for n, t in enumerate(positions):
            future = torch.zeros((), dtype=logp.dtype)
            for power, j in enumerate(positions[n + 1 :], start=1):
                if spec.future is None:
                    break
                if spec.future == "exact":
                    assert exact is not None
                    term = exact[b, j].detach()
                else:
                    term = value_of(spec.estimator if spec.future == "own" else spec.future, u[b, j])
                per_decision, discount = spec.correction == "decision", spec.gamma**power
                factor = each[b, j] if per_decision else weight[b, t] if spec.top is None else sampled[b, t]
                future = future + factor * discount * term
                if spec.future == "exact":
                    future = future + (sampled[b, j] if per_decision else sampled[b, t]) * discount * rest[b, j]
            if own_is_exact:
                assert exact is not None
                own, values[b, t] = exact[b, t], exact[b, t].detach()
            else:
                own, values[b, t] = (
                    own_surrogate(spec.estimator, logp[b, t], ref[b, t]),
                    value_of(spec.estimator, u[b, t]),
                )
            if spec.clip is None:
                losses[b, t] = weight[b, t] * own + (sampled[b, t] * rest[b, t] + future) * logp[b, t]
            else:
                (slope,) = torch.autograd.grad(own, logp, retain_graph=True)
                score, live = slope[b, t] + future, rho[b, t].exp()  # weight is 1 here: correction is "none"
                losses[b, t] = torch.maximum(live * score, live.clamp(1 - spec.clip, 1 + spec.clip) * score)
    return losses, values


def penalty(
    spec: KLSpec,
    logp: Tensor,
    ref: Tensor,
    mask: Tensor,
    exact: Tensor | None = None,
    remainder: Tensor | None = None,
) -> Tensor:
    """The score penalty, term by term."""
    result, u = torch.zeros_like(logp), logp - ref
    for b in range(mask.shape[0]):
        positions = [t for t in range(mask.shape[1]) if mask[b, t]]
        for n, t in enumerate(positions):
            result[b, t] = value_of("k1" if spec.estimator == "exact" else spec.estimator, u[b, t])
            for power, j in enumerate(positions[n + 1 :], start=1):
                if spec.future == "exact":
                    assert exact is not None
                    rest = 0.0 if spec.top is None or remainder is None else remainder[b, j]
                    result[b, t] += spec.gamma**power * (exact[b, j] + rest)
                elif spec.future is not None:
                    kind = spec.estimator if spec.future == "own" else spec.future
                    result[b, t] += spec.gamma**power * value_of(kind, u[b, j])
    return result
