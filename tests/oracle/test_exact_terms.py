"""What an average over the vocabulary changes: as a score nothing is left, and its noise is smaller token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.oracle.enumeration import Problem, make_problem
from tests.support.oracle.expectation import full_vocabulary_kl, logits, released_tail, score_gradient
from tests.support.oracle.problems import TOLERANCE, problems
from tests.support.oracle.targets import relative_error, target_gradient

by_problem = pytest.mark.parametrize("problem", problems(), ids=lambda problem: problem.name)


def exact(problem: Problem) -> Tensor:
    return full_vocabulary_kl(problem).detach().nan_to_num(0.0)


def sampled(problem: Problem) -> Tensor:
    return (problem.log_probs("current") - problem.log_probs("reference")).detach()


def variance(problem: Problem, per_sequence: Tensor) -> float:
    mean = problem.expected(per_sequence, "current")
    return float(problem.expected((per_sequence - mean).square(), "current"))


@by_problem
def test_the_exact_kl_of_a_state_regularises_nothing_as_a_score_of_its_own_token(problem: Problem) -> None:
    """It is the same whichever token is drawn, and the scores of a state average to zero."""
    assert score_gradient(problem, exact(problem), "current").norm() < 1e-14
    assert score_gradient(problem, sampled(problem), "current").norm() > 1e-3


@by_problem
def test_token_by_token_the_exact_value_varies_less(problem: Problem) -> None:
    for t in range(problem.length):
        assert variance(problem, exact(problem)[:, t]) < variance(problem, sampled(problem)[:, t])


def test_summed_over_a_response_the_exact_value_may_vary_more() -> None:
    """The first log-ratio can make up for what its next state costs; the exact value of the first state cannot."""
    first = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    ref_first = torch.tensor([[0.2, 0.8]], dtype=torch.float64)
    second = torch.tensor([[0.5, 0.5], [0.999, 0.001]], dtype=torch.float64)
    ref_second = torch.tensor([[0.5, 0.5], [0.25, 0.75]], dtype=torch.float64)
    problem = make_problem(2, 2, seed=0).with_policies(
        current=[first.log(), second.log()], reference=[ref_first.log(), ref_second.log()]
    )
    whole, drawn = exact(problem).sum(-1), sampled(problem).sum(-1)
    torch.testing.assert_close(problem.expected(whole, "current"), problem.expected(drawn, "current"))
    assert variance(problem, whole) > 10 * variance(problem, drawn)


@by_problem
@pytest.mark.parametrize("top", [1, 2])
def test_the_published_tail_is_biased_by_the_gradient_of_the_heads_mass(problem: Problem, top: int) -> None:
    """A head that differentiates log p as well has the gradient of P(S) too much, which the full sum cancels."""
    log_p = torch.log_softmax(logits(problem, "current").nan_to_num(0.0), -1)
    head = torch.zeros_like(log_p).scatter(-1, log_p.topk(top, -1).indices, 1.0)
    mass = (head * log_p.exp()).sum(-1) * problem.mask
    too_much = problem.gradient(problem.expected(mass.sum(-1), "current"))
    wanted = target_gradient(problem, "reverse_kl_token", "", "current")
    assert relative_error(released_tail(problem, top), wanted + too_much) < TOLERANCE
