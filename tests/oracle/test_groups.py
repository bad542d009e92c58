"""What group normalisation of rewards does to a KL that was put into them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.oracle.enumeration import Problem, make_problem
from tests.support.oracle.expectation import penalty_for, score_gradient
from tests.support.oracle.problems import TOLERANCE
from tests.support.oracle.specs import parse
from tests.support.oracle.targets import relative_error, target_gradient

PROBLEM = make_problem(2, 2, seed=7)


def grouped_gradient(problem: Problem, returns: Tensor, size: int, leave_one_out: bool) -> Tensor:
    """Expected gradient over all groups of `size` independent sequences, each scored by its centred return."""
    groups = torch.cartesian_prod(*[torch.arange(len(returns))] * size).reshape(-1, size)
    members = returns[groups]
    if leave_one_out:
        advantages = members - (members.sum(-1, keepdim=True) - members) / (size - 1)
    else:
        advantages = members - members.mean(-1, keepdim=True)
    probability = problem.probabilities("current").detach()[groups].prod(-1, keepdim=True)
    log_probs = problem.log_probs("current").sum(-1)[groups]
    return problem.gradient((probability * advantages * log_probs).sum() / size)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_centring_by_the_group_mean_shrinks_the_kl_gradient(size: int) -> None:
    returns = penalty_for(parse("k1@reward"), PROBLEM).sum(-1)
    target = target_gradient(PROBLEM, "reverse_kl_sequence", "", "current")
    centred = grouped_gradient(PROBLEM, returns, size, leave_one_out=False)
    assert relative_error(centred, (1 - 1 / size) * target) < TOLERANCE
    assert relative_error(grouped_gradient(PROBLEM, returns, size, leave_one_out=True), target) < TOLERANCE


def normalised(rewards: Tensor) -> Tensor:
    return (rewards - rewards.mean()) / rewards.std()


def test_beta_does_nothing_where_rewards_tie_and_are_divided_by_their_spread() -> None:
    kl = penalty_for(parse("k1@reward"), PROBLEM).sum(-1)
    tied = torch.ones_like(kl)
    weak, strong = normalised(tied - 1e-3 * kl), normalised(tied - 1.0 * kl)
    torch.testing.assert_close(weak, strong, rtol=TOLERANCE, atol=1e-12)
    # The same penalty after normalisation stays proportional to beta; std is 0 there, so advantages are 0.
    penalty = penalty_for(parse("k1@advantage"), PROBLEM)
    weak_gradient, strong_gradient = (score_gradient(PROBLEM, beta * penalty, "current") for beta in (1e-3, 1.0))
    assert relative_error(weak_gradient * 1e3, strong_gradient) < TOLERANCE


def test_beta_matters_where_rewards_differ() -> None:
    kl = penalty_for(parse("k1@reward"), PROBLEM).sum(-1)
    rewards = torch.arange(len(kl), dtype=torch.float64)
    assert (normalised(rewards - 1e-3 * kl) - normalised(rewards - 1.0 * kl)).abs().max() > 0.1
