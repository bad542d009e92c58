"""Statements that hold sample by sample, or for one distribution, rather than for a gradient's expectation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kl_plugins import kl_term
from tests.support.oracle.enumeration import Problem, make_problem
from tests.support.oracle.expectation import full_vocabulary_kl, penalty_for, reward_to_go, term_for, weights
from tests.support.oracle.problems import TOLERANCE, bandit, problems
from tests.support.oracle.specs import ADVANTAGES, LOSSES, REWARDS, parse

by_problem = pytest.mark.parametrize("problem", problems(), ids=lambda problem: problem.name)


def live(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs as a leaf, u and the token log-weight over the sampler, all (N, T)."""
    logp = problem.log_probs("current").detach().requires_grad_()
    return logp, logp - problem.log_probs("reference"), logp - problem.log_probs("sampler")


def coefficient_by_autograd(logp: Tensor, surrogate: Tensor, mask: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad((surrogate * mask).sum(), logp)
    return gradient * mask


def assert_same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=1e-13)


@by_problem
def test_live_ratio_times_k3_is_detached_ratio_times_k2(problem: Problem) -> None:
    logp, u, log_weight = live(problem)
    surrogate = log_weight.exp() * ((-u).exp() - 1 + u)
    by_autograd = coefficient_by_autograd(logp, surrogate, problem.mask)
    assert_same(term_for(parse("k2@loss/is:token"), problem, "sampler").coefficient, by_autograd)
    assert_same(term_for(parse("k3+@loss/is:token"), problem, "sampler").coefficient, by_autograd)


@by_problem
def test_live_prefix_weight_times_k3_is_per_decision_with_a_k3_future(problem: Problem) -> None:
    logp, u, log_weight = live(problem)
    surrogate = log_weight.cumsum(-1).exp() * ((-u).exp() - 1 + u)
    spec = parse("k2@loss/horizon:sequence/future:k3/is:decision")
    coefficient = term_for(spec, problem, "sampler").coefficient
    assert_same(coefficient, coefficient_by_autograd(logp, surrogate, problem.mask))


@by_problem
def test_live_prefix_weight_times_k1_adds_only_a_weighted_score(problem: Problem) -> None:
    logp, u, log_weight = live(problem)
    weight = log_weight.cumsum(-1).exp()
    spec = parse("k2@loss/horizon:sequence/is:decision")
    coefficient = term_for(spec, problem, "sampler").coefficient + (weight * problem.mask).detach()
    assert_same(coefficient, coefficient_by_autograd(logp, weight * u, problem.mask))


@by_problem
def test_exact_terms_take_the_weight_one_token_earlier(problem: Problem) -> None:
    # The expectation is the same with the token's own weight, as that has mean 1; only the variance is not.
    through = weights(problem, "sampler", "prefix")
    before = torch.cat([torch.ones_like(through[:, :1]), through[:, :-1]], 1) * problem.mask
    own = term_for(parse("exact@loss/is:prefix"), problem, "sampler")
    assert_same(own.weight, before)
    assert_same(own.coefficient, torch.zeros_like(before))
    kl = full_vocabulary_kl(problem).detach().nan_to_num(0.0)
    future = reward_to_go(before * kl) - before * kl
    whole = term_for(parse("exact@loss/horizon:sequence/is:decision"), problem, "sampler")
    assert_same(whole.coefficient, future * problem.mask)
    mixed = term_for(parse("k2@loss/horizon:sequence/future:exact/is:decision"), problem, "sampler")
    u = (problem.log_probs("current") - problem.log_probs("reference")).detach()
    assert_same(mixed.coefficient, (through * u + future) * problem.mask)


F: dict[str, Callable[[Tensor], Tensor]] = {
    "jeffreys": lambda delta: (delta - 1) * delta.log(),
    "hellinger": lambda delta: (1 - delta.sqrt()).square(),
    "chi2": lambda delta: (delta - 1).square() / 2,
    "jsd": lambda delta: 0.5 * (delta * (2 * delta / (1 + delta)).log() - ((1 + delta) / 2).log()),
    "alpha-0.5": lambda delta: (delta.sqrt() - 0.5 * delta - 0.5) / -0.25,
    "alpha-1": lambda delta: delta * delta.log() - delta + 1,
}


@by_problem
@pytest.mark.parametrize("name", F)
def test_live_prefix_weight_times_any_f_is_per_decision(problem: Problem, name: str) -> None:
    logp, u, log_weight = live(problem)
    surrogate = log_weight.cumsum(-1).exp() * F[name]((-u).exp())
    coefficient = term_for(parse(f"{name}@loss/horizon:sequence/is:decision"), problem, "sampler").coefficient
    assert_same(coefficient, coefficient_by_autograd(logp, surrogate, problem.mask))


@by_problem
def test_live_ratio_times_k2_has_half_u_squared_too_much(problem: Problem) -> None:
    logp, u, log_weight = live(problem)
    by_autograd = coefficient_by_autograd(logp, log_weight.exp() * u.square() / 2, problem.mask)
    correct = term_for(parse("k2@loss/is:token"), problem, "sampler").coefficient
    excess = (log_weight.exp() * u.square() / 2 * problem.mask).detach()
    assert_same(by_autograd, correct + excess)


def test_live_ratio_times_k2_turns_round_below_minus_two() -> None:
    u = torch.tensor([[-2.5, -2.0, -1.5]], dtype=torch.float64)
    logp = (u - 4.0).requires_grad_()
    ratio = (logp - logp.detach()).exp()
    (wrong,) = torch.autograd.grad((ratio * (logp + 4.0).square() / 2).sum(), logp)
    term = kl_term(
        parse("k2@loss/is:token"), logp, logp.detach() - u, torch.ones_like(u, dtype=torch.bool), old_logp=logp.detach()
    )
    assert torch.equal(wrong.sign(), torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64))
    assert torch.equal(term.coefficient.sign(), -torch.ones_like(u))


@pytest.mark.parametrize("text", LOSSES + REWARDS + ADVANTAGES)
def test_nothing_pulls_at_the_reference(text: str) -> None:
    spec = parse(text)
    for problem in problems():
        still = problem.with_policies(current=problem.policies["reference"])
        if spec.placement != "loss":
            coefficient = penalty_for(spec, still)
        else:
            coefficient = term_for(spec, still, "sampler").coefficient
            if spec.estimator == "k1":
                if spec.horizon == "token" and spec.correction == "none":
                    assert_same(coefficient, still.mask.double())
                continue
        assert float(coefficient.abs().max()) < 1e-14


def test_k3_coefficient_differs_from_k2s_by_its_taylor_series() -> None:
    step = torch.tensor([[-2.0, -1.0, 1.0, 2.0]], dtype=torch.float64) * 1e-2
    logp = torch.full_like(step, -1.0).requires_grad_()
    reference = logp.detach() + (1 + step).log()
    mask = torch.ones_like(step, dtype=torch.bool)
    k2, k3 = (kl_term(parse(f"{name}@loss"), logp, reference, mask).coefficient for name in ("k2", "k3"))
    series = step.square() / 2 - step**3 / 3
    # What is left begins with a quarter of the fourth power, then a fifth of the fifth; a sixth of step^2 is 7e-5.
    torch.testing.assert_close((k2 - k3 - series) / step**4, 0.25 - step / 5, rtol=1e-3, atol=0)


def test_variance_of_k3s_coefficient_is_chi_squared() -> None:
    problem = bandit()
    coefficient = term_for(parse("k3@loss"), problem, "current", given=()).coefficient[:, 0]
    policy, reference = (problem.probabilities(name).detach() for name in ("current", "reference"))
    mean = problem.expected(coefficient, "current")
    variance = problem.expected((coefficient - mean).square(), "current")
    torch.testing.assert_close(variance, ((reference - policy).square() / policy).sum(), rtol=TOLERANCE, atol=0)


def test_worked_instance() -> None:
    policy = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    problem = make_problem(4, 1, seed=0).with_policies(
        current=[policy.log()[None]], reference=[policy.flip(0).log()[None]]
    )

    def rounded(values: Tensor) -> list[float]:
        return [round(float(value), 4) for value in values.reshape(-1)]

    def gradient(name: str) -> Tensor:
        term = term_for(parse(f"{name}@loss"), problem, "current", given=())
        return problem.gradient(problem.expected(term.loss.sum(-1), "current"))

    values = {
        name: problem.expected(term_for(parse(f"{name}@loss"), problem, "current", given=()).value.sum(-1), "current")
        for name in ("k1", "k2", "k3")
    }
    assert rounded(torch.stack([values["k1"], values["k3"], values["k2"]])) == [0.4564, 0.4564, 0.5216]
    torch.testing.assert_close(
        gradient("k2"), torch.tensor([0.3719, -0.0153, -0.1724, -0.1843], dtype=torch.float64), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(gradient("k3"), torch.tensor([0.3, 0.1, -0.1, -0.3], dtype=torch.float64))
    assert gradient("k1").norm() < 1e-15
