"""Which specs have the regularised optimum pi*(y) ~ ref(y) exp(R(y) / beta) as their fixed point."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.oracle.enumeration import Problem, make_problem
from tests.support.oracle.expectation import loss_gradient, policy_gradient
from tests.support.oracle.specs import parse

BETA = 0.5
PROBLEM = make_problem(3, 3, seed=11)
REWARD = torch.rand(27, generator=torch.Generator().manual_seed(12), dtype=torch.float64).mul(2).round()

REACHES = ["k1@reward", "k1@advantage", "k1@advantage/future:k3", "k2@loss/horizon:sequence"]
MISSES = ["k2@loss", "k3@loss", "k1@advantage/horizon:token", "k3@loss/horizon:sequence", "jeffreys@loss"]


def optimum(problem: Problem) -> list[Tensor]:
    """Logit tables of pi*, by conditioning its distribution over sequences on each prefix."""
    weight = problem.probabilities("reference") * (REWARD / BETA).exp()
    tables = []
    for t in range(problem.length):
        shape = (problem.vocab**t, problem.vocab, -1)
        tables.append((weight / weight.sum()).reshape(shape).sum(-1).log())
    return tables


def ascent(problem: Problem, text: str) -> Tensor:
    """Exact gradient of the expected reward minus beta times what the spec contributes."""
    spec = parse(text)
    if spec.placement == "loss":
        penalty = loss_gradient(spec, problem, "current", given=())
    else:
        penalty = policy_gradient(spec, problem)
    return problem.gradient((problem.probabilities("current") * REWARD).sum()) - BETA * penalty


def kl_to(problem: Problem, tables: list[Tensor]) -> float:
    best = problem.with_policies(old=tables)
    gap = (best.log_probs("current") - best.log_probs("old")).sum(-1)
    return float((best.probabilities("current") * gap).sum().detach())


def train(problem: Problem, text: str, steps: int) -> Problem:
    """Adam on exact gradients, from the reference."""
    problem = problem.with_policies(current=problem.policies["reference"])
    optimiser = torch.optim.Adam(problem.policies["current"], lr=0.2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, gamma=0.99)
    for _ in range(steps):
        gradients = torch.split(ascent(problem, text), [table.numel() for table in problem.policies["current"]])
        for table, gradient in zip(problem.policies["current"], gradients, strict=True):
            table.grad = -gradient.reshape(table.shape)
        optimiser.step()
        schedule.step()
    return problem


@pytest.mark.parametrize("text", REACHES)
def test_optimum_is_a_fixed_point(text: str) -> None:
    at_optimum = PROBLEM.with_policies(current=optimum(PROBLEM))
    assert ascent(at_optimum, text).norm() < 1e-14


@pytest.mark.parametrize("text", MISSES)
def test_optimum_is_no_fixed_point(text: str) -> None:
    at_optimum = PROBLEM.with_policies(current=optimum(PROBLEM))
    assert ascent(at_optimum, text).norm() > 1e-3


@pytest.mark.parametrize("text", ["k1@reward", "k1@advantage/future:k3"])
def test_training_reaches_the_optimum(text: str) -> None:
    assert kl_to(train(PROBLEM, text, 400), optimum(PROBLEM)) < 1e-6


@pytest.mark.parametrize("text", ["k2@loss", "k3@loss"])
def test_training_token_local_terms_stops_elsewhere(text: str) -> None:
    assert kl_to(train(PROBLEM, text, 400), optimum(PROBLEM)) > 1e-3


def test_training_k1_as_loss_equals_training_without_any_kl() -> None:
    free = train(PROBLEM, "k1@loss", 400)
    best_reward = float(REWARD.max())
    assert float((free.probabilities("current") * REWARD).sum().detach()) > best_reward - 0.01
    assert kl_to(free, optimum(PROBLEM)) > 0.1
