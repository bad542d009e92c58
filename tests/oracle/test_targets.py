"""Every spec's expected gradient against its own `target`: the named gradient, or none of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kl_plugins import KLSpec
from tests.support.oracle.enumeration import Problem
from tests.support.oracle.expectation import (
    loss_gradient,
    padded,
    penalty_for,
    policy_gradient,
    score_gradient,
    term_for,
)
from tests.support.oracle.problems import MARGIN, TOLERANCE, problems
from tests.support.oracle.specs import ADVANTAGES, LOSSES, REWARDS, SAMPLED, parse, targets_none
from tests.support.oracle.targets import OTHER_F, all_targets, per_state, relative_error, reverse_kl, target_gradient

OFF_POLICY = ("old", "sampler")


def nearest_target(gradient: Tensor, problem: Problem, data: str) -> tuple[str, float]:
    """The target that the gradient is closest to, and the relative error."""
    errors = {name: relative_error(gradient, exact) for name, exact in all_targets(problem, data).items()}
    name = min(errors, key=lambda key: errors[key])
    return name, errors[name]


def assert_is_target(gradient: Tensor, spec: KLSpec, problem: Problem, data: str) -> None:
    exact = target_gradient(problem, spec.target, spec.estimator, data)
    error = relative_error(gradient, exact)
    assert error < TOLERANCE, (
        f"{spec} on {problem.name}, data from {data}: {error:.2e} from {spec.target}; "
        f"nearest is {nearest_target(gradient, problem, data)}"
    )


def assert_is_no_target(gradient: Tensor, spec: KLSpec, problem: Problem, data: str) -> None:
    name, error = nearest_target(gradient, problem, data)
    assert error > MARGIN, f"{spec} on {problem.name}, data from {data}: {error:.2e} from {name}"


@pytest.mark.parametrize("text", LOSSES + REWARDS + ADVANTAGES)
def test_declared_target_is_none_where_the_theory_says_so(text: str) -> None:
    spec = parse(text)
    assert (spec.target == "none") == targets_none(text)
    assert spec.allow_biased == (spec.target == "none")


@pytest.mark.parametrize("text", LOSSES)
def test_loss_gradient_is_the_declared_target(text: str) -> None:
    spec = parse(text)
    uncorrected = spec.correction == "none"
    for problem in problems():
        for data in ("current",) if uncorrected else OFF_POLICY:
            gradient = loss_gradient(spec, problem, data, given=() if uncorrected else None)
            check = assert_is_no_target if spec.target == "none" else assert_is_target
            check(gradient, spec, problem, data)


@pytest.mark.parametrize("text", [text for text in LOSSES if "is:none" in text and text != "exact@loss/is:none"])
def test_without_correction_stale_data_give_no_target(text: str) -> None:
    spec = parse(text)
    assert not spec.target.endswith("_behaviour")
    for problem in problems():
        for data in OFF_POLICY:
            # Sampler log-probs beside is:none feed metrics only, so they must not repair anything.
            assert_is_no_target(loss_gradient(spec, problem, data), spec, problem, data)


def test_an_exact_local_term_on_stale_data_is_exact_on_their_states() -> None:
    spec = parse("exact@loss")
    for problem in problems():
        for data in OFF_POLICY:
            on_data_states = target_gradient(problem, "reverse_kl_token_behaviour", "", data)
            assert relative_error(loss_gradient(spec, problem, data), on_data_states) < TOLERANCE


@pytest.mark.parametrize("text", LOSSES)
def test_weights_change_nothing_on_policy(text: str) -> None:
    weighted, plain = parse(text), parse(text.rpartition("/is:")[0])
    for problem in problems():
        gradient = loss_gradient(weighted, problem, "current")
        plain_gradient = loss_gradient(plain, problem, "current", given=())
        torch.testing.assert_close(gradient, plain_gradient, rtol=TOLERANCE, atol=1e-13)


@pytest.mark.parametrize("data", OFF_POLICY)
@pytest.mark.parametrize("text", ["k2@loss/is:token", "k3@loss/is:prefix", "k2@loss/horizon:sequence/is:decision"])
def test_named_behaviour_policy_is_the_one_used(text: str, data: str) -> None:
    spec = parse(f"{text}/behaviour:{data}")
    for problem in problems():
        assert_is_target(loss_gradient(spec, problem, data, given=OFF_POLICY), spec, problem, data)
        other = OFF_POLICY[1 - OFF_POLICY.index(data)]
        assert_is_no_target(loss_gradient(spec, problem, other, given=OFF_POLICY), spec, problem, other)


@pytest.mark.parametrize("text", ["k2@loss/is:token", "k2@loss/is:prefix"])
def test_automatic_behaviour_policy_is_the_sampler_if_given(text: str) -> None:
    spec = parse(text)
    for problem in problems():
        assert_is_target(loss_gradient(spec, problem, "sampler", given=OFF_POLICY), spec, problem, "sampler")


@pytest.mark.parametrize("text", REWARDS + ADVANTAGES)
def test_policy_gradient_of_a_score_is_the_declared_target(text: str) -> None:
    spec = parse(text)
    for problem in problems():
        check = assert_is_no_target if spec.target == "none" else assert_is_target
        check(policy_gradient(spec, problem), spec, problem, "current")


@pytest.mark.parametrize("text", [text for text in REWARDS + ADVANTAGES if not targets_none(text)])
def test_policy_gradient_of_a_score_off_policy(text: str) -> None:
    spec = parse(text)
    for problem in problems():
        for data in OFF_POLICY:
            # The host weights the whole term: whole-sequence weights always repair it, prefix weights where the
            # penalty looks at its own token only, token weights never.
            assert_is_target(policy_gradient(spec, problem, data, "sequence"), spec, problem, data)
            by_prefix = policy_gradient(spec, problem, data, "prefix")
            by_token = policy_gradient(spec, problem, data, "token")
            if spec.horizon == "token" and spec.placement == "advantage":
                assert_is_target(by_prefix, spec, problem, data)
                on_data_states = target_gradient(problem, "reverse_kl_token_behaviour", "", data)
                assert relative_error(by_token, on_data_states) < TOLERANCE
            else:
                assert_is_no_target(by_prefix, spec, problem, data)
                assert_is_no_target(by_token, spec, problem, data)
            assert_is_no_target(policy_gradient(spec, problem, data), spec, problem, data)


# k2 and |u| are left out: their expectation is no divergence, only their gradient is one's.
@pytest.mark.parametrize("estimator", [name for name in (*SAMPLED, "exact") if name not in ("k2", "abs")])
def test_value_is_an_unbiased_estimate_of_its_divergence(estimator: str) -> None:
    spec = parse(f"{estimator}@loss")
    divergence = OTHER_F.get(spec.estimator, reverse_kl)
    for problem in problems():
        states = problem.state_probabilities("current")
        exact = sum((p * d).sum() for p, d in zip(states, per_state(problem, divergence), strict=True))
        value = term_for(spec, problem, "current", given=()).value
        torch.testing.assert_close(problem.expected(value.sum(-1), "current"), exact, rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("text", ["k1@advantage/gamma:0.7", "k2@loss/horizon:sequence/gamma:0.7/is:decision"])
def test_discount_counts_response_tokens(text: str) -> None:
    spec = parse(text)
    for problem in problems():
        u = padded(problem, (problem.log_probs("current") - problem.log_probs("reference")).detach())
        discounted = torch.zeros_like(u)
        for t in range(problem.length):
            for j in range(t, problem.length):
                discounted[:, t] += (0.7 ** (j - t) * u[:, j]).nan_to_num(0.0)
        exact = score_gradient(problem, discounted, "current")
        if spec.placement == "loss":
            assert relative_error(loss_gradient(spec, problem, "current"), exact) < TOLERANCE
        else:
            assert relative_error(score_gradient(problem, penalty_for(spec, problem), "current"), exact) < TOLERANCE
            assert relative_error(exact, target_gradient(problem, spec.target, "", "current")) > MARGIN
