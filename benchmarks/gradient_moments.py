"""Exact mean and variance of the gradient of one sequence under a KL spec, without sampling.

All sequences of small tabular policies are enumerated (`tests/support/oracle/enumeration.py`). kl-plugins computes
their coefficients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kl_plugins import KLSpec
from tests.support.oracle.enumeration import Problem, make_problem
from tests.support.oracle.expectation import full_vocabulary_kl, penalty_for, reward_to_go, term_for
from tests.support.oracle.targets import reverse_kl_of_sequences, target_gradient

Blocks = Callable[[Problem], Tensor]
"""(N, T, V) gradient of each sequence with respect to the logits of each state that it passes through."""


@dataclass(frozen=True)
class Moments:
    """Moments of the gradient of one sequence from the data policy, relative to an exact gradient.

    Attributes:
        variance: trace of the covariance, divided by the squared norm of the gradient of the sequences' KL.
        bias_sequence: distance of the mean from the gradient of the sequences' KL, divided by the norm of the latter.
        bias_token: distance of the mean from the token-local gradient, divided by the norm of the latter.
        error_64: relative root-mean-square error of the mean of 64 sequences, as an estimate of the gradient of the
            sequences' KL.
    """

    variance: float
    bias_sequence: float
    bias_token: float
    error_64: float


def score(problem: Problem) -> Tensor:
    """Return the (N, T, V) gradient of log pi(a_t | s_t): one-hot minus the distribution, 0 outside the mask."""
    probabilities = [log_p.exp()[problem.states[:, t]] for t, log_p in enumerate(problem.distributions("current"))]
    one_hot = torch.nn.functional.one_hot(problem.tokens, problem.vocab)
    return ((one_hot - torch.stack(probabilities, 1)) * problem.mask[..., None]).detach()


def local_kl_gradient(problem: Problem) -> Tensor:
    """Return the (N, T, V) gradient of the exact KL of each state, pi_j (u_j - KL), 0 outside the mask."""
    columns = []
    pairs = zip(problem.distributions("current"), problem.distributions("reference"), strict=True)
    for t, (log_p, log_q) in enumerate(pairs):
        u = log_p - log_q
        kl = (log_p.exp() * u).sum(-1, keepdim=True)
        columns.append((log_p.exp() * (u - kl))[problem.states[:, t]])
    return (torch.stack(columns, 1) * problem.mask[..., None]).detach()


def log_ratio(problem: Problem) -> Tensor:
    """Return the (N, T) log-ratios u_t, nats, 0 outside the mask."""
    return (problem.log_probs("current") - problem.log_probs("reference")).detach()


def of_spec(spec: KLSpec, problem: Problem, data: str) -> Tensor:
    """Return what each sequence contributes under a spec: the gradient of a loss, or the policy gradient of a score."""
    if spec.placement != "loss":
        penalty = penalty_for(spec, problem)
        coefficient = reward_to_go(penalty) if spec.placement == "reward" else penalty
        return coefficient[..., None] * score(problem)
    term = term_for(spec, problem, data)
    blocks = term.coefficient[..., None] * score(problem)
    if spec.estimator == "exact":
        blocks = blocks + term.weight[..., None] * local_kl_gradient(problem)
    return blocks


def full_return(problem: Problem) -> Tensor:
    """Return the gradient with the log-ratio of the whole sequence on every token, that is, without reward-to-go."""
    return log_ratio(problem).sum(-1)[:, None, None] * score(problem)


def exact_with_baseline(problem: Problem) -> Tensor:
    """Return the gradient of exact own and future KL, with the mean future KL of each position as baseline."""
    kl = full_vocabulary_kl(problem).detach().nan_to_num(0.0)
    future = reward_to_go(kl) - kl
    weight = problem.probabilities("current").detach()[:, None] * problem.mask
    baseline = (weight * future).sum(0) / weight.sum(0)
    return (future - baseline)[..., None] * score(problem) + local_kl_gradient(problem)


def mean_gradient(problem: Problem, blocks: Tensor, data: str) -> Tensor:
    """Return the mean gradient under the policy `data`, flattened in the order of the logit tables."""
    weighted = problem.probabilities(data).detach()[:, None, None] * blocks
    tables = []
    for t, table in enumerate(problem.policies["current"]):
        tables.append(torch.zeros_like(table).index_add(0, problem.states[:, t], weighted[:, t]).flatten())
    return torch.cat(tables).detach()


def moments(problem: Problem, blocks: Tensor, data: str) -> Moments:
    """Return the exact moments of the gradient of one sequence from the policy `data`."""
    sequence = target_gradient(problem, "reverse_kl_sequence", "", data)
    token = target_gradient(problem, "reverse_kl_token", "", data)
    mean = mean_gradient(problem, blocks, data)
    # Each position has its own table, so the blocks of a sequence have no parameter in common.
    second = problem.expected(blocks.square().sum((-1, -2)), data)
    scale = sequence.norm().square()
    variance = float((second - mean.square().sum()) / scale)
    bias = float((mean - sequence).norm() / sequence.norm())
    return Moments(
        variance=variance,
        bias_sequence=bias,
        bias_token=float((mean - token).norm() / token.norm()),
        error_64=(bias**2 + variance / 64) ** 0.5,
    )


def problem_at(sequence_kl: float, vocab: int, length: int, seed: int, *, scale: float, staleness: float) -> Problem:
    """Find, by bisection, the problem of a seed whose current policy is `sequence_kl` nats from the reference."""

    def at(drift: float) -> Problem:
        return make_problem(vocab, length, seed, scale=scale, drift=drift, lag=staleness, mismatch=staleness)

    low, high = 0.0, 8.0
    for _ in range(50):
        middle = (low + high) / 2
        below = float(reverse_kl_of_sequences(at(middle)).detach()) < sequence_kl
        low, high = (middle, high) if below else (low, middle)
    return at((low + high) / 2)


def staleness_kl(problem: Problem) -> float:
    """Return KL(current policy || sampler) of sequences, nats."""
    gap = (problem.log_probs("current") - problem.log_probs("sampler")).sum(-1)
    return float((problem.probabilities("current") * gap).sum().detach())
