"""Exact gradients of the exact objectives, by autograd through full-vocabulary sums.

Each divergence is written from its textbook definition in the two distributions, not from an estimator's f, so that
agreement means something.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests.support.oracle.enumeration import Problem

Divergence = Callable[[Tensor, Tensor], Tensor]


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension, in nats."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p) over the last dimension, in nats."""
    return reverse_kl(log_q, log_p)


def jeffreys(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) + KL(q || p)."""
    return reverse_kl(log_p, log_q) + reverse_kl(log_q, log_p)


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Mean of the two KLs to the mixture."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    return 0.5 * reverse_kl(log_p, log_m) + 0.5 * reverse_kl(log_q, log_m)


def squared_hellinger(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum of (sqrt p - sqrt q)^2."""
    return ((log_p / 2).exp() - (log_q / 2).exp()).square().sum(-1)


def half_chi_squared(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Half of chi^2(q || p) = sum (q - p)^2 / p."""
    return 0.5 * ((log_q.exp() - log_p.exp()).square() / log_p.exp()).sum(-1)


def twice_total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """L1 distance."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1)


def alpha_divergence(alpha: float) -> Divergence:
    """(sum p^(1-a) q^a - 1) / (a (a - 1)), whose limits are the reverse (a -> 0) and forward (a -> 1) KL."""

    def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
        if alpha == 1.0:
            return forward_kl(log_p, log_q)
        return (((1 - alpha) * log_p + alpha * log_q).exp().sum(-1) - 1.0) / (alpha * (alpha - 1.0))

    return divergence


# The divergences that a spec's `other_f_*` target refers to, by the estimator as it is written in a spec.
OTHER_F: dict[str, Divergence] = {
    "abs": twice_total_variation,
    "jeffreys": jeffreys,
    "jsd": jensen_shannon,
    "hellinger": squared_hellinger,
    "chi2": half_chi_squared,
    "alpha-0.5": alpha_divergence(0.5),
    "alpha-1": alpha_divergence(1.0),
    "alpha-3": alpha_divergence(3.0),
}
# alpha-1 is the forward KL, which has target names of its own for a single token.
DISTINCT_F = tuple(name for name in OTHER_F if name != "alpha-1")


def per_state(problem: Problem, divergence: Divergence, policy: str = "current") -> list[Tensor]:
    """For each position the (V^t,) divergence between the policy and the reference."""
    pairs = zip(problem.distributions(policy), problem.distributions("reference"), strict=True)
    return [divergence(log_p, log_q) for log_p, log_q in pairs]


def token_objective(problem: Problem, divergence: Divergence, states_from: str) -> Tensor:
    """sum_t E_{s_t} D(s_t) with the states' distribution held fixed."""
    states = problem.state_probabilities(states_from)
    return torch.stack(
        [(p.detach() * d).sum() for p, d in zip(states, per_state(problem, divergence), strict=True)]
    ).sum()


def sequence_objective(problem: Problem, divergence: Divergence) -> Tensor:
    """sum_t E_{s_t} D(s_t) where the states, too, come from the policy being differentiated."""
    states = problem.state_probabilities("current")
    return torch.stack([(p * d).sum() for p, d in zip(states, per_state(problem, divergence), strict=True)]).sum()


def reverse_kl_of_sequences(problem: Problem) -> Tensor:
    """KL between the two distributions over whole sequences, without the chain rule."""
    log_ratio = (problem.log_probs("current") - problem.log_probs("reference")).sum(-1)
    return (problem.probabilities("current") * log_ratio).sum()


def target_gradient(problem: Problem, target: str, estimator: str, data: str) -> Tensor:
    """Gradient that `KLSpec.target` promises.

    Args:
        problem: policies and sequences.
        target: a target's name as in `KLSpec.target`, not `none`.
        estimator: names the divergence of an `other_f_*` target.
        data: policy that the data were drawn from; the states of the `*_behaviour` targets.
    """

    def compute() -> Tensor:
        if target == "reverse_kl_sequence":
            return problem.gradient(reverse_kl_of_sequences(problem))
        stem, _, rest = target.partition("_token")
        if target == "other_f_sequence":
            return problem.gradient(sequence_objective(problem, OTHER_F[estimator]))
        divergence = {"reverse_kl": reverse_kl, "forward_kl": forward_kl, "other_f": OTHER_F.get(estimator)}[stem]
        assert divergence is not None, f"no divergence is written down for {estimator!r}"
        return problem.gradient(token_objective(problem, divergence, data if rest == "_behaviour" else "current"))

    return problem.cached(f"{target}|{estimator if 'other_f' in target else ''}|{data}", compute)


def all_targets(problem: Problem, data: str) -> dict[str, Tensor]:
    """Every target that any spec could name, for showing that a gradient is none of them."""
    result = {
        name: target_gradient(problem, name, "", data)
        for name in (
            "reverse_kl_sequence",
            "reverse_kl_token",
            "reverse_kl_token_behaviour",
            "forward_kl_token",
            "forward_kl_token_behaviour",
        )
    }
    for estimator in DISTINCT_F:
        for name in ("other_f_token", "other_f_token_behaviour"):
            result[f"{name}[{estimator}]"] = target_gradient(problem, name, estimator, data)
    for estimator in OTHER_F:
        result[f"other_f_sequence[{estimator}]"] = target_gradient(problem, "other_f_sequence", estimator, data)
    return result


def relative_error(gradient: Tensor, target: Tensor) -> float:
    """|gradient - target| / |target|, Euclidean over all parameters."""
    return float((gradient - target).norm() / target.norm())
