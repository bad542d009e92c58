"""The oracle checks itself before it judges anything."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.support.oracle.enumeration import POLICIES, Problem
from tests.support.oracle.problems import MARGIN, TOLERANCE, bandit, problems
from tests.support.oracle.targets import (
    OTHER_F,
    all_targets,
    forward_kl,
    relative_error,
    reverse_kl,
    reverse_kl_of_sequences,
    sequence_objective,
    token_objective,
)

by_problem = pytest.mark.parametrize("problem", problems(), ids=lambda problem: problem.name)


@by_problem
@pytest.mark.parametrize("policy", POLICIES)
def test_probabilities_sum_to_one(problem: Problem, policy: str) -> None:
    torch.testing.assert_close(problem.probabilities(policy).sum().item(), 1.0, rtol=0, atol=1e-13)


@by_problem
def test_states_are_reached_as_often_as_the_sequences_pass_through_them(problem: Problem) -> None:
    probabilities = problem.probabilities("sampler")
    for t, reached in enumerate(problem.state_probabilities("sampler")):
        passing = torch.zeros_like(reached).index_add(0, problem.states[:, t], probabilities * problem.mask[:, t])
        torch.testing.assert_close(passing, reached)


@by_problem
def test_every_sequence_is_there_once(problem: Problem) -> None:
    rows = {tuple(row) for row in problem.tokens.tolist()}
    assert len(rows) == len(problem.tokens)
    if problem.stops:
        assert set(problem.mask.sum(-1).tolist()) == set(range(1, problem.length + 1))
    else:
        assert len(rows) == problem.vocab**problem.length


@by_problem
def test_chain_rule_of_the_kl(problem: Problem) -> None:
    whole = reverse_kl_of_sequences(problem)
    by_token = sequence_objective(problem, reverse_kl)
    torch.testing.assert_close(whole, by_token)
    assert relative_error(problem.gradient(whole), problem.gradient(by_token)) < TOLERANCE


@by_problem
@pytest.mark.parametrize("data", ["old", "sampler"])
def test_targets_differ_from_one_another(problem: Problem, data: str) -> None:
    # Otherwise the statement that a gradient equals one target and no other would be empty.
    for (name, one), (other_name, other) in itertools.combinations(all_targets(problem, data).items(), 2):
        assert relative_error(one, other) > MARGIN, (name, other_name)


def test_targets_of_one_action_coincide() -> None:
    problem = bandit()
    whole = problem.gradient(reverse_kl_of_sequences(problem))
    assert relative_error(problem.gradient(token_objective(problem, reverse_kl, "current")), whole) < TOLERANCE


def test_softmax_closed_forms() -> None:
    problem = bandit()
    (logits,), (reference_logits,) = problem.policies["current"], problem.policies["reference"]
    policy, reference = torch.softmax(logits[0], -1).detach(), torch.softmax(reference_logits[0], -1)
    u = policy.log() - reference.log()
    kl = (policy * u).sum()
    reverse = problem.gradient(token_objective(problem, reverse_kl, "current"))
    forward = problem.gradient(token_objective(problem, forward_kl, "current"))
    torch.testing.assert_close(reverse, policy * (u - kl), rtol=TOLERANCE, atol=1e-14)
    torch.testing.assert_close(forward, policy - reference, rtol=TOLERANCE, atol=1e-14)


@pytest.mark.parametrize("name", OTHER_F)
def test_divergences_are_zero_at_the_reference_and_positive_elsewhere(name: str) -> None:
    log_p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
    log_q = log_p.flip(0)
    assert abs(float(OTHER_F[name](log_p, log_p))) < 1e-14
    assert float(OTHER_F[name](log_p, log_q)) > 0.1
