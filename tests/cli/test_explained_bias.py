"""What ``explain`` says of the bias on-policy and off-policy, against exact enumeration."""

import pytest
import torch
from torch import Tensor

from kl_plugins.explain import explain
from tests.support.oracle.enumeration import Problem
from tests.support.oracle.expectation import loss_gradient, penalty_for, reward_to_go, score_gradient
from tests.support.oracle.problems import MARGIN, TOLERANCE, problems
from tests.support.oracle.specs import ADVANTAGES, LOSSES, REWARDS, TOP_LOSSES, parse
from tests.support.oracle.targets import all_targets, relative_error, target_gradient

PROBLEMS = problems()[:2]


def assert_estimates(gradient: Tensor, target: str, text: str, problem: Problem, data: str) -> None:
    if target != "none":
        exact = target_gradient(problem, target, parse(text).estimator, data)
        assert relative_error(gradient, exact) < TOLERANCE, f"{text}: not {target} on data from {data}"
        return
    errors = {name: relative_error(gradient, exact) for name, exact in all_targets(problem, data).items()}
    nearest = min(errors, key=lambda name: errors[name])
    assert errors[nearest] > MARGIN, f"{text}: {nearest} on data from {data}, but explained as none"


def score(text: str, problem: Problem, data: str) -> Tensor:
    """Gradient of a host that reweights each token, with log-ratios frozen at rollout time."""
    spec = parse(text)
    penalty = penalty_for(spec, problem, data)
    coefficient = reward_to_go(penalty) if spec.placement == "reward" else penalty
    return score_gradient(problem, coefficient, data, "token")


@pytest.mark.parametrize("text", LOSSES + TOP_LOSSES)
def test_losses(text: str) -> None:
    explanation, spec = explain(text), parse(text)
    for problem in PROBLEMS:
        for data, estimate in (("current", explanation.on_policy), ("old", explanation.off_policy)):
            gradient = loss_gradient(spec, problem, data, given=None if spec.needs_behaviour else ())
            assert_estimates(gradient, estimate.target, text, problem, data)


@pytest.mark.parametrize("text", REWARDS + ADVANTAGES)
def test_scores(text: str) -> None:
    explanation = explain(text)
    for problem in PROBLEMS:
        for data, estimate in (("current", explanation.on_policy), ("old", explanation.off_policy)):
            assert_estimates(score(text, problem, data), estimate.target, text, problem, data)


def test_unweighted_k1_on_stale_data_leaves_the_behaviour_policy() -> None:
    assert "minus that of KL(behaviour || policy)" in explain("k1@loss").off_policy.text
    for problem in PROBLEMS:
        gradient = loss_gradient(parse("k1@loss"), problem, "old", given=())
        divergence = -problem.expected(problem.log_probs("current").sum(-1), "old")
        torch.testing.assert_close(gradient, -problem.gradient(divergence), rtol=TOLERANCE, atol=1e-13)
