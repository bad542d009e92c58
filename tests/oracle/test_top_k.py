"""A set of tokens and a bucket exactly, the rest by the drawn token: unbiased on any data, wherever it stands."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from kl_plugins import KLSpec, kl_penalty, kl_term
from tests.support.oracle.enumeration import Problem
from tests.support.oracle.expectation import (
    exact_for,
    full_vocabulary_kl,
    loss_gradient,
    padded,
    policy_gradient,
    released_tail,
    score_gradient,
    term_for,
    top_k_kl,
    weights,
)
from tests.support.oracle.problems import MARGIN, TOLERANCE, problems
from tests.support.oracle.specs import parse
from tests.support.oracle.targets import all_targets, relative_error, target_gradient

TOPS = (1, 2)
ON_POLICY = ["exact@loss", "exact@loss/horizon:sequence", "exact@loss/horizon:sequence/future:k1"]
OFF_POLICY = [
    "exact@loss/is:token",
    "exact@loss/is:prefix",
    "exact@loss/is:sequence",
    "exact@loss/horizon:sequence/is:decision",
    "exact@loss/horizon:sequence/is:sequence",
    "exact@loss/horizon:sequence/future:k1/is:decision",
]
by_problem = pytest.mark.parametrize("problem", problems(), ids=lambda problem: problem.name)
WIDE = [problem for problem in problems() if problem.vocab > 2]
"""A bucket of one token has no remainder."""


def sets(problem: Problem) -> list[tuple[int, ...]]:
    """Every set of tokens, but the empty one."""
    return [s for k in range(1, problem.vocab + 1) for s in combinations(range(problem.vocab), k)]


@by_problem
@pytest.mark.parametrize("text", ON_POLICY)
def test_on_policy_for_every_set(text: str, problem: Problem) -> None:
    spec = parse(f"{text}/top:1")
    wanted = target_gradient(problem, spec.target, "", "current")
    for chosen in sets(problem):
        exact = exact_for(spec, problem, "current", chosen)
        assert relative_error(loss_gradient(spec, problem, "current", given=(), exact=exact), wanted) < TOLERANCE


@by_problem
@pytest.mark.parametrize("text", OFF_POLICY)
def test_off_policy_for_every_set(text: str, problem: Problem) -> None:
    spec = parse(f"{text}/top:1")
    for data in ("old", "sampler"):
        wanted = target_gradient(problem, spec.target, "", data)
        for chosen in sets(problem):
            exact = exact_for(spec, problem, "current", chosen)
            assert relative_error(loss_gradient(spec, problem, data, exact=exact), wanted) < TOLERANCE


@pytest.mark.parametrize("top", TOPS)
@pytest.mark.parametrize("text", OFF_POLICY)
def test_weights_change_nothing_on_policy(text: str, top: int) -> None:
    weighted, plain = parse(f"{text}/top:{top}"), parse(f"{text.rpartition('/is:')[0]}/top:{top}")
    for problem in problems():
        one, other = loss_gradient(weighted, problem, "current"), loss_gradient(plain, problem, "current", given=())
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=1e-13)


@pytest.mark.parametrize("top", TOPS)
def test_as_an_advantage(top: int) -> None:
    spec = parse(f"exact@advantage/top:{top}")
    for problem in problems():
        wanted = target_gradient(problem, spec.target, "", "current")
        assert relative_error(policy_gradient(spec, problem), wanted) < TOLERANCE


def test_stale_data_need_the_weight() -> None:
    """Unlike the whole vocabulary, a sampled remainder is not exact on the behaviour policy's states."""
    spec = parse("exact@loss/top:1")
    for problem in WIDE:
        for data in ("old", "sampler"):
            gradient = loss_gradient(spec, problem, data)
            assert min(relative_error(gradient, wanted) for wanted in all_targets(problem, data).values()) > MARGIN


def test_without_the_remainder_something_is_missing() -> None:
    """The control of the tests above: sum and bucket alone are not the KL."""
    spec = parse("exact@loss/top:1")
    for problem in WIDE:
        given = exact_for(spec, problem, "current")
        bucket = {"exact": given["exact"], "remainder": torch.zeros_like(given["remainder"])}
        gradient = loss_gradient(spec, problem, "current", given=(), exact=bucket)
        assert relative_error(gradient, target_gradient(problem, spec.target, "", "current")) > MARGIN


@pytest.mark.parametrize("problem", WIDE, ids=lambda problem: problem.name)
def test_floor_and_cap_bend_the_remainder_alone(problem: Problem) -> None:
    data, spec = "sampler", parse("exact@loss/top:1/is:token/floor:0.8/cap:1.2")
    remainder = top_k_kl(problem, 1).remainder
    rho = weights(problem, data, "token")
    outside = remainder != 0
    assert ((rho < 0.8) & outside).any()
    assert ((rho > 1.2) & outside).any()
    target = target_gradient(problem, "reverse_kl_token_behaviour", "", data)
    extra = ((0.8 - rho).clamp_min(0.0) - (rho - 1.2).clamp_min(0.0)) * remainder
    gradient = loss_gradient(spec, problem, data)
    assert relative_error(gradient, target + score_gradient(problem, extra, data)) < TOLERANCE
    assert relative_error(gradient, target) > MARGIN


@by_problem
def test_a_small_cap_leaves_set_and_bucket_whole(problem: Problem) -> None:
    """Their token weight is 1 because they are averages, so there is nothing to cap."""
    term = term_for(parse("exact@loss/top:2/is:token/cap:0.5"), problem, "sampler")
    found = top_k_kl(problem, 2)
    bucket = problem.gradient(problem.expected(found.kl.sum(-1), "sampler"))
    capped = weights(problem, "sampler", "token").clamp_max(0.5) * found.remainder
    wanted = bucket + score_gradient(problem, capped, "sampler")
    assert relative_error(problem.gradient(problem.expected(term.loss.sum(-1), "sampler")), wanted) < TOLERANCE
    assert float(term.weight.max()) == 0.5
    assert torch.equal(term.value[problem.mask], found.kl.detach()[problem.mask])


@by_problem
def test_at_the_reference_there_is_no_force(problem: Problem) -> None:
    at_reference = problem.with_policies(current=problem.policies["reference"])
    spec = parse("exact@loss/top:1/is:token/floor:0.5")
    assert (weights(at_reference, "sampler", "token") < 0.5).any()
    assert loss_gradient(spec, at_reference, "sampler").norm() < 1e-13


@by_problem
def test_set_and_bucket_are_a_lower_bound_and_never_negative(problem: Problem) -> None:
    whole = full_vocabulary_kl(problem)[problem.mask].detach()
    for chosen in sets(problem):
        found = top_k_kl(problem, chosen)
        kl = found.kl[problem.mask].detach()
        assert (kl >= 0).all()
        assert (kl <= whole + 1e-14).all()
        assert (kl < whole - 1e-6).any() == (len(chosen) < problem.vocab - 1)
        total = padded(problem, found.kl + found.remainder).detach().nan_to_num(0.0).sum(-1)
        exact = full_vocabulary_kl(problem).detach().nan_to_num(0.0).sum(-1)
        torch.testing.assert_close(problem.expected(total, "current"), problem.expected(exact, "current"))


def test_all_tokens_are_exact() -> None:
    for problem in problems():
        whole = full_vocabulary_kl(problem)[problem.mask]
        found = top_k_kl(problem, problem.vocab + 5)
        assert not found.remainder.any()
        every = found.kl[problem.mask]
        torch.testing.assert_close(every, whole, rtol=1e-10, atol=1e-12)
        factor = torch.linspace(0.5, 1.5, len(whole), dtype=torch.float64)
        gradients = [problem.gradient((factor * kl).sum()) for kl in (every, whole)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@by_problem
def test_the_metrics_report_set_and_bucket(problem: Problem) -> None:
    term = term_for(parse("exact@loss/top:1/is:token/floor:0.9"), problem, "sampler")
    mean = top_k_kl(problem, 1).kl.detach()[problem.mask].mean()
    rho = weights(problem, "sampler", "token")[problem.mask]
    for key, wanted in (
        ("kl/value", mean),
        ("kl/exact", mean),
        ("kl/weight/mean", rho.mean()),
        ("kl/floor_frac", (rho < 0.9).double().mean()),
    ):
        torch.testing.assert_close(term.metrics[key], wanted)
    assert term.metrics["kl/dead_frac"] == 0


def test_the_published_tail_is_biased() -> None:
    for problem in problems():
        wanted = target_gradient(problem, "reverse_kl_token", "", "current")
        assert relative_error(released_tail(problem, 1), wanted) > MARGIN


def test_mistakes() -> None:
    one = torch.zeros(1, 2)
    mask = one.bool()
    with pytest.raises(ValueError, match="leaves no remainder"):
        kl_term(KLSpec.parse("exact@loss"), one, one, mask, exact=one, remainder=one)
    for text in ("exact@loss/top", "exact@loss/top/is:token/floor:0.5", "exact@loss/horizon:sequence/top"):
        with pytest.raises(ValueError, match="pass remainder"):
            kl_term(KLSpec.parse(text), one, one, mask, exact=one, old_logp=one)
    with pytest.raises(ValueError, match="pass remainder"):
        kl_penalty(KLSpec.parse("exact@advantage/top"), one, one, mask, exact=one)
