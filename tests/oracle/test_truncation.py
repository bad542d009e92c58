"""cap, band, norm and clip bend the estimate by a known amount and no more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.oracle.enumeration import Problem
from tests.support.oracle.expectation import loss_gradient, score_gradient, weights
from tests.support.oracle.problems import MARGIN, TOLERANCE, problems
from tests.support.oracle.specs import parse
from tests.support.oracle.targets import relative_error, target_gradient

by_problem = pytest.mark.parametrize("problem", problems(), ids=lambda problem: problem.name)
DATA = "sampler"


def own(problem: Problem) -> Tensor:
    return (problem.log_probs("current") - problem.log_probs("reference")).detach()


@by_problem
def test_cap_loses_the_excess_weight(problem: Problem) -> None:
    rho = weights(problem, DATA, "token")
    cap = 1.2
    assert (rho > cap).any()
    lost = score_gradient(problem, (rho - cap).clamp_min(0.0) * own(problem), DATA)
    target = target_gradient(problem, "reverse_kl_token_behaviour", "", DATA)
    gradient = loss_gradient(parse(f"k2@loss/is:token/cap:{cap}"), problem, DATA)
    assert relative_error(gradient, target - lost) < TOLERANCE
    assert relative_error(gradient, target) > MARGIN


@by_problem
def test_band_loses_what_is_outside(problem: Problem) -> None:
    rho = weights(problem, DATA, "prefix")
    outside = (rho < 0.8) | (rho > 1.25)
    assert (outside & problem.mask).any()
    lost = score_gradient(problem, rho * outside * own(problem), DATA)
    target = target_gradient(problem, "reverse_kl_token", "", DATA)
    gradient = loss_gradient(parse("k2@loss/is:prefix/band:0.8-1.25"), problem, DATA)
    assert relative_error(gradient, target - lost) < TOLERANCE


@by_problem
def test_cap_then_band_then_norm(problem: Problem) -> None:
    rho = weights(problem, DATA, "token").clamp_max(1.3)
    rho = torch.where((rho < 0.7) | (rho > 1.3), 0.0, rho)
    mean = rho[problem.mask].mean()
    gradient = loss_gradient(parse("k2@loss/is:token/cap:1.3/band:0.7-1.3/norm"), problem, DATA)
    assert relative_error(gradient, score_gradient(problem, rho / mean * own(problem), DATA)) < TOLERANCE


@by_problem
def test_per_decision_weights_are_capped_one_by_one(problem: Problem) -> None:
    rho = weights(problem, DATA, "prefix").clamp_max(1.2)
    weighted = rho * own(problem) * problem.mask
    coefficient = weighted.flip(-1).cumsum(-1).flip(-1)
    gradient = loss_gradient(parse("k2@loss/horizon:sequence/is:decision/cap:1.2"), problem, DATA)
    assert relative_error(gradient, score_gradient(problem, coefficient, DATA)) < TOLERANCE


@by_problem
@pytest.mark.parametrize("truncation", ["cap:1e6", "band:0-1e6"])
def test_wide_truncation_changes_nothing(problem: Problem, truncation: str) -> None:
    target = target_gradient(problem, "reverse_kl_token_behaviour", "", DATA)
    assert relative_error(loss_gradient(parse(f"k2@loss/is:token/{truncation}"), problem, DATA), target) < TOLERANCE


def clipped_head(problem: Problem, head: Tensor, eps: float) -> Tensor:
    """Autograd of E_mu max(rho k', clip(rho, 1 - eps, 1 + eps) k') with the ratio live."""
    rho = (problem.log_probs("current") - problem.log_probs(DATA)).exp()
    loss = torch.maximum(rho * head, rho.clamp(1 - eps, 1 + eps) * head)
    return problem.gradient(problem.expected((loss * problem.mask).sum(-1), DATA))


@by_problem
@pytest.mark.parametrize("eps", [0.05, 0.2])
def test_clip_is_the_clipped_head(problem: Problem, eps: float) -> None:
    gradient = loss_gradient(parse(f"k2@loss/clip:{eps}"), problem, DATA)
    assert relative_error(gradient, clipped_head(problem, own(problem), eps)) < TOLERANCE
    delta = (-own(problem)).exp()
    gradient = loss_gradient(parse(f"k3@loss/clip:{eps}"), problem, DATA)
    assert relative_error(gradient, clipped_head(problem, 1 - delta, eps)) < TOLERANCE


@by_problem
def test_clip_with_a_future_term_clips_the_sum(problem: Problem) -> None:
    head = (own(problem) * problem.mask).flip(-1).cumsum(-1).flip(-1)
    gradient = loss_gradient(parse("k2@loss/horizon:sequence/clip:0.1"), problem, DATA)
    assert relative_error(gradient, clipped_head(problem, head, 0.1)) < TOLERANCE


@by_problem
def test_wide_clip_is_the_token_weight(problem: Problem) -> None:
    target = target_gradient(problem, "reverse_kl_token_behaviour", "", DATA)
    spec = parse("k2@loss/clip:1e6")
    assert spec.target == "reverse_kl_token_behaviour"
    assert relative_error(loss_gradient(spec, problem, DATA), target) < TOLERANCE
