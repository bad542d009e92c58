"""What the refused specs estimate instead: wrong by exactly what the theory gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.oracle.enumeration import Problem
from tests.support.oracle.expectation import (
    loss_gradient,
    penalty_for,
    policy_gradient,
    reward_to_go,
    score_gradient,
)
from tests.support.oracle.problems import TOLERANCE, bandit, problems
from tests.support.oracle.specs import parse
from tests.support.oracle.targets import relative_error, reverse_kl, target_gradient, token_objective

by_problem = pytest.mark.parametrize("problem", problems(), ids=lambda problem: problem.name)
by_data = pytest.mark.parametrize("data", ["old", "sampler"])


def exact(problem: Problem, target: str, data: str = "current", estimator: str = "") -> Tensor:
    return target_gradient(problem, target, estimator, data)


def log_ratio(problem: Problem) -> Tensor:
    return problem.log_probs("current") - problem.log_probs("reference")


def gradient_of_expected(problem: Problem, value: Callable[[Tensor], Tensor]) -> Tensor:
    """Gradient of E_pi sum_t value(u_t), through the sampling and through the value."""
    values = (value(log_ratio(problem)) * problem.mask).sum(-1)
    return problem.gradient((problem.probabilities("current") * values).sum())


def pathwise(problem: Problem, value: Callable[[Tensor], Tensor]) -> Tensor:
    """E_pi sum_t of the gradient of value(u_t): what the score term leaves out."""
    return problem.gradient(problem.expected((value(log_ratio(problem)) * problem.mask).sum(-1), "current"))


VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "k2": lambda u: u.square() / 2,
    "k3": lambda u: (-u).exp() - 1 + u,
    "k3+": lambda u: (-u).exp() - 1 + u,
    "abs": lambda u: u.abs(),
    "jeffreys": lambda u: u * (1 - (-u).exp()),
    "hellinger": lambda u: (1 - (-u / 2).exp()).square(),
    "chi2": lambda u: (1 - (-u).exp()).square() / 2,
}


@by_problem
@by_data
@pytest.mark.parametrize("correction", ["token", "prefix", "sequence"])
def test_k1_as_loss_is_zero_at_any_reference(problem: Problem, data: str, correction: str) -> None:
    assert loss_gradient(parse("k1@loss"), problem, "current", given=()).norm() < 1e-14
    assert loss_gradient(parse(f"k1@loss/is:{correction}"), problem, data).norm() < 1e-14


@by_problem
@by_data
def test_k1_as_loss_off_policy_pushes_away_from_the_data(problem: Problem, data: str) -> None:
    # Uncorrected it is minus the gradient of KL(mu || pi), with no trace of the reference in it.
    cross_entropy = -problem.expected(problem.log_probs("current").sum(-1), data)
    gradient = loss_gradient(parse("k1@loss"), problem, data)
    assert relative_error(gradient, -problem.gradient(cross_entropy)) < TOLERANCE


@by_problem
def test_k1_as_loss_with_a_future_term_keeps_only_the_future(problem: Problem) -> None:
    future = exact(problem, "reverse_kl_sequence") - exact(problem, "reverse_kl_token")
    gradient = loss_gradient(parse("k1@loss/horizon:sequence"), problem, "current", given=())
    assert relative_error(gradient, future) < TOLERANCE


@by_problem
def test_k3_as_loss_with_a_future_term_mixes_both_directions(problem: Problem) -> None:
    future = exact(problem, "reverse_kl_sequence") - exact(problem, "reverse_kl_token")
    gradient = loss_gradient(parse("k3@loss/horizon:sequence"), problem, "current", given=())
    assert relative_error(gradient, exact(problem, "forward_kl_token") + future) < TOLERANCE


@by_problem
def test_k2_in_reward(problem: Problem) -> None:
    wrong = gradient_of_expected(problem, VALUES["k2"]) - exact(problem, "reverse_kl_token")
    assert relative_error(policy_gradient(parse("k2@reward"), problem), wrong) < TOLERANCE


@by_problem
@pytest.mark.parametrize("text", ["k3@reward", "k3+@reward", "k3@advantage", "k3@advantage/future:k3"])
def test_k3_in_a_score_loses_the_forward_kl(problem: Problem, text: str) -> None:
    wrong = exact(problem, "reverse_kl_sequence") - exact(problem, "forward_kl_token")
    assert relative_error(policy_gradient(parse(text), problem), wrong) < TOLERANCE


@by_problem
def test_k3_in_a_score_of_its_own_token(problem: Problem) -> None:
    wrong = exact(problem, "reverse_kl_token") - exact(problem, "forward_kl_token")
    assert relative_error(policy_gradient(parse("k3@advantage/horizon:token"), problem), wrong) < TOLERANCE


def test_k3_in_reward_of_one_action_is_reverse_minus_forward() -> None:
    problem = bandit()
    wrong = exact(problem, "reverse_kl_token") - exact(problem, "forward_kl_token")
    assert relative_error(policy_gradient(parse("k3@reward"), problem), wrong) < TOLERANCE


@by_problem
@pytest.mark.parametrize("estimator", VALUES)
def test_any_value_in_reward_loses_its_pathwise_part(problem: Problem, estimator: str) -> None:
    wrong = gradient_of_expected(problem, VALUES[estimator]) - pathwise(problem, VALUES[estimator])
    assert relative_error(policy_gradient(parse(f"{estimator}@reward"), problem), wrong) < TOLERANCE


@by_problem
@pytest.mark.parametrize("estimator", ["jeffreys", "hellinger", "chi2"])
def test_an_f_divergence_in_reward_is_its_sequence_form_without_the_pathwise_part(
    problem: Problem, estimator: str
) -> None:
    whole = exact(problem, "other_f_sequence", estimator=estimator)
    gradient = policy_gradient(parse(f"{estimator}@reward"), problem)
    assert relative_error(gradient, whole - pathwise(problem, VALUES[estimator])) < TOLERANCE


def expected_future(problem: Problem, continuation: str) -> list[Tensor]:
    """For each position the (V^t, V) expected sum of later u after taking a token and going on by `continuation`."""
    distributions = problem.distributions(continuation)
    pairs = zip(problem.distributions("current"), problem.distributions("reference"), strict=True)
    ratios = [(current - reference).detach() for current, reference in pairs]
    futures = [torch.zeros_like(distributions[-1])]
    for t in range(problem.length - 1, 0, -1):
        worth = (distributions[t].exp() * (ratios[t] + futures[0])).sum(-1).detach()
        after = worth.reshape(distributions[t - 1].shape).clone()
        if problem.stops:
            after[:, 0] = 0.0
        futures.insert(0, after)
    return futures


@by_problem
@by_data
@pytest.mark.parametrize(("correction", "states"), [("token", "data"), ("prefix", "current")])
def test_too_short_a_weight_sees_the_data_policys_future(
    problem: Problem, data: str, correction: str, states: str
) -> None:
    # The weight of token t repairs its own action (and, with a prefix, its state), never what follows.
    states_from = data if states == "data" else "current"
    wrong = token_objective(problem, reverse_kl, states_from)
    futures = expected_future(problem, data)
    for reached, log_p, future in zip(
        problem.state_probabilities(states_from), problem.distributions("current"), futures, strict=True
    ):
        wrong = wrong + (reached.detach()[:, None] * log_p.exp() * future).sum()
    gradient = loss_gradient(parse(f"k2@loss/horizon:sequence/is:{correction}"), problem, data)
    assert relative_error(gradient, problem.gradient(wrong)) < TOLERANCE
    # A host that weights k1 in reward that way makes the same error.
    assert relative_error(policy_gradient(parse("k1@reward"), problem, data, correction), gradient) < TOLERANCE


@by_problem
@by_data
def test_a_log_ratio_frozen_at_the_data_policy_also_pulls_towards_nothing(problem: Problem, data: str) -> None:
    # Whole-sequence weights, but u from the data policy's log-probs: KL(pi || ref) - KL(pi || mu).
    penalty = reward_to_go(penalty_for(parse("k1@reward"), problem, evaluated=data))
    gradient = score_gradient(problem, penalty, data, "sequence")
    gap = (problem.log_probs("current") - problem.log_probs(data)).sum(-1)
    kl_to_data = problem.gradient((problem.probabilities("current") * gap).sum())
    assert relative_error(gradient, exact(problem, "reverse_kl_sequence") - kl_to_data) < TOLERANCE
