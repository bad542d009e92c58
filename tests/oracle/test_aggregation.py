"""What a host's way of joining token terms does to the target: which sums keep its direction, and which do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kl_plugins.aggregation import MEANINGS, SEQUENCE_MEAN_CAVEAT
from tests.support.oracle.enumeration import Problem, make_problem
from tests.support.oracle.expectation import term_for
from tests.support.oracle.problems import MARGIN, TOLERANCE
from tests.support.oracle.specs import parse
from tests.support.oracle.targets import relative_error, target_gradient

UNEVEN = make_problem(3, 3, seed=4, stops=True)
EVEN = make_problem(3, 3, seed=1)
SPEC = parse("k2@loss")


def batch_gradient(problem: Problem, kind: str, size: int) -> Tensor:
    """Expected gradient over all batches of `size` independent responses, joined the host's way."""
    terms = (term_for(SPEC, problem, "current", given=()).loss.masked_fill(~problem.mask, 0.0)).sum(-1)
    lengths = problem.mask.sum(-1).double()
    batches = torch.cartesian_prod(*[torch.arange(len(terms))] * size).reshape(-1, size)
    drawn, counts = terms[batches], lengths[batches]
    joined = {
        "token sum": drawn.sum(-1),
        "constant": drawn.sum(-1) / (size * 7),
        "token mean": drawn.sum(-1) / counts.sum(-1),
        "sequence mean": (drawn / counts).mean(-1),
    }[kind]
    probability = problem.probabilities("current").detach()[batches].prod(-1)
    return problem.gradient((probability * joined).sum())


def off_in_direction(gradient: Tensor, target: Tensor) -> float:
    """Relative error that is left once beta has been rescaled as well as it can be."""
    return relative_error(gradient * (gradient @ target) / gradient.square().sum(), target)


def target_of(problem: Problem) -> Tensor:
    return target_gradient(problem, SPEC.target, "", "current")


@pytest.mark.parametrize("kind", MEANINGS)
def test_with_one_length_every_way_only_rescales_beta(kind: str) -> None:
    factor = {"token sum": 2.0, "constant": 1 / 7, "token mean": 1 / EVEN.length, "sequence mean": 1 / EVEN.length}
    assert relative_error(batch_gradient(EVEN, kind, 2), factor[kind] * target_of(EVEN)) < TOLERANCE


@pytest.mark.parametrize(("kind", "factor"), [("token sum", 3.0), ("constant", 1 / 7)])
def test_sums_keep_the_target_where_lengths_differ(kind: str, factor: float) -> None:
    assert relative_error(batch_gradient(UNEVEN, kind, 3), factor * target_of(UNEVEN)) < TOLERANCE


def test_a_mean_over_each_response_is_another_gradient() -> None:
    """No beta repairs it, and more responses do not either."""
    target = target_of(UNEVEN)
    alone, three = (batch_gradient(UNEVEN, "sequence mean", size) for size in (1, 3))
    assert relative_error(three, alone) < TOLERANCE
    assert off_in_direction(alone, target) > 0.1
    assert "1/|y|" in SEQUENCE_MEAN_CAVEAT


def test_a_mean_over_all_tokens_comes_to_the_target_as_the_batch_grows() -> None:
    """Its divisor depends on the batch: a batch of one response is the mean over that response."""
    target = target_of(UNEVEN)
    errors = [off_in_direction(batch_gradient(UNEVEN, "token mean", size), target) for size in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    assert MARGIN < errors[-1] < errors[0] / 2
    alone = batch_gradient(UNEVEN, "sequence mean", 1)
    assert relative_error(batch_gradient(UNEVEN, "token mean", 1), alone) < TOLERANCE
