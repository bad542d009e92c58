"""A floor on the weight: its bias is the stated one, it keeps a pull where the weight loses it, and where it is refused
it does harm.

Specs that the grammar refuses are built by hand here, so that the core computes what they would mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kl_plugins import KLSpec, KLSpecError, estimators, kl_term, register_estimator
from kl_plugins.estimators import Estimator, all_estimators, find_estimator
from tests.support.oracle.enumeration import Problem, make_problem
from tests.support.oracle.expectation import loss_gradient, score_gradient, weights
from tests.support.oracle.problems import MARGIN, TOLERANCE, problems
from tests.support.oracle.specs import parse
from tests.support.oracle.targets import relative_error, target_gradient

by_problem = pytest.mark.parametrize("problem", problems(), ids=lambda problem: problem.name)
DATA = "sampler"

COEFFICIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "k2": lambda u: u,
    "k3": lambda u: 1 - (-u).exp(),
    "k3+": lambda u: u,
    "abs": lambda u: u.sign(),
    "jeffreys": lambda u: u + 1 - (-u).exp(),
    "jsd": lambda u: -((1 + (-u).exp()) / 2).log() / 2,
    "hellinger": lambda u: 1 - (-u / 2).exp(),
    "chi2": lambda u: (1 - (-2 * u).exp()) / 2,
    "alpha-0.5": lambda u: 2 * (1 - (-u / 2).exp()),
    "alpha-3": lambda u: (1 - (-3 * u).exp()) / 3,
}
ALPHAS = ("alpha-0.1", "alpha-0.5", "alpha-0.9", "alpha-1", "alpha-2", "alpha-3")


def log_ratio(problem: Problem) -> Tensor:
    return (problem.log_probs("current") - problem.log_probs("reference")).detach()


def raised(problem: Problem, floor: float, level: str = "token") -> Tensor:
    """(N, T) what the floor adds to the weights."""
    return (floor - weights(problem, DATA, level)).clamp_min(0.0)


@by_problem
@pytest.mark.parametrize("floor", [0.9, 1.0])
@pytest.mark.parametrize("estimator", COEFFICIENTS)
def test_the_bias_is_the_stated_one(problem: Problem, estimator: str, floor: float) -> None:
    spec = parse(f"{estimator}@loss/is:token/floor:{floor}")
    target = target_gradient(problem, spec.target, estimator, DATA)
    extra = raised(problem, floor) * COEFFICIENTS[estimator](log_ratio(problem))
    bias = score_gradient(problem, extra, DATA)
    gradient = loss_gradient(spec, problem, DATA)
    assert relative_error(gradient, target + bias) < TOLERANCE
    assert relative_error(gradient, target) > MARGIN


@by_problem
def test_floor_and_cap_bend_it_on_their_own_sides(problem: Problem) -> None:
    rho, u = weights(problem, DATA, "token"), log_ratio(problem)
    assert ((rho < 0.8) & problem.mask).any()
    assert ((rho > 1.2) & problem.mask).any()
    target = target_gradient(problem, "reverse_kl_token_behaviour", "", DATA)
    bias = score_gradient(problem, (raised(problem, 0.8) - (rho - 1.2).clamp_min(0.0)) * u, DATA)
    gradient = loss_gradient(parse("k2@loss/is:token/floor:0.8/cap:1.2"), problem, DATA)
    assert relative_error(gradient, target + bias) < TOLERANCE


@by_problem
def test_a_floor_below_every_weight_changes_no_bit(problem: Problem) -> None:
    assert weights(problem, DATA, "token")[problem.mask].min() > 1e-3
    assert torch.equal(
        loss_gradient(parse("k2@loss/is:token/floor:1e-3"), problem, DATA),
        loss_gradient(parse("k2@loss/is:token"), problem, DATA),
    )


@by_problem
@pytest.mark.parametrize("estimator", COEFFICIENTS)
def test_the_reference_stays_a_point_without_force(problem: Problem, estimator: str) -> None:
    at_reference = problem.with_policies(current=problem.policies["reference"])
    assert (weights(at_reference, DATA, "token") < 0.5).any()
    assert loss_gradient(parse(f"{estimator}@loss/is:token/floor:0.5"), at_reference, DATA).norm() < 1e-13


# One state with two tokens: the first has probability r exp(u) under the policy.
REFERENCE, BEHAVIOUR, FLOOR = 0.2, 0.6, 0.5


def force(spec: KLSpec, u: Tensor, future: float = 0.0) -> Tensor:
    """Expected derivative of the loss by the first token's logit; (N,).

    Args:
        spec: what to compute, valid or not.
        u: (N,) log(policy/reference) of the first token, one policy each.
        future: log-ratio of the token that comes after: the same whichever token came first, its weight 1.
    """
    first = REFERENCE * u.exp()
    policy = torch.stack([first, 1 - first], 1).log()
    given = torch.tensor([[REFERENCE, BEHAVIOUR], [1 - REFERENCE, 1 - BEHAVIOUR]], dtype=u.dtype).log()
    # Two rows of two positions for each policy: the drawn token, then the one after.
    logp = torch.stack([policy.flatten(), torch.zeros(2 * len(u), dtype=u.dtype)], 1)
    ref, behaviour = (torch.stack([given[:, i].repeat(len(u)), torch.zeros(2 * len(u))], 1) for i in (0, 1))
    ref[:, 1] = -future
    term = kl_term(replace(spec, bound=600.0), logp, ref, torch.ones_like(logp).bool(), sampler_logp=behaviour)
    score = torch.stack([1 - first, -first], 1)  # of each drawn token, by the first token's logit
    drawn = torch.tensor([BEHAVIOUR, 1 - BEHAVIOUR], dtype=u.dtype)
    return (drawn * term.coefficient[:, 0].reshape(-1, 2) * score).sum(1)


def grid(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def refused(text: str, floor: float = FLOOR) -> KLSpec:
    """A spec with a floor that the grammar does not allow there."""
    spec = parse(text)
    with pytest.raises(KLSpecError):
        KLSpec.parse(f"{text}/floor:{floor}")
    return replace(spec, floor=floor)


def rows() -> list[Estimator]:
    named = [find_estimator(name) for name in ALPHAS]
    return [*(row for row in all_estimators() if row.name != "exact"), *(row for row in named if row)]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
def test_rows_say_truly_whether_they_restore_and_whether_they_keep_their_pull(row: Estimator) -> None:
    """Every row is checked by its own coefficient: the sign of u, and the limit of exp(u) c(u) as u goes to -inf."""
    u = grid(-40, -3, -1, -1e-3, 0, 1e-3, 1, 3, 40)
    assert torch.equal(row.coefficient(u, u).sign(), u.sign()) is row.restoring
    far = grid(-200)
    assert bool((far.exp() * row.coefficient(far, far)).abs() > 0.1) is row.keeps_pull
    if row.restoring:  # under a floor the coefficient alone is left, and it does not fade
        assert row.coefficient(far, far).abs() > 0.9


@pytest.mark.parametrize("estimator", COEFFICIENTS)
def test_a_floor_keeps_the_pull_that_the_exact_weight_may_lose(estimator: str) -> None:
    row = find_estimator(estimator)
    assert row is not None
    weighted, floored = (parse(f"{estimator}@loss/is:token{floor}") for floor in ("", f"/floor:{FLOOR}"))
    far = grid(-20)
    # Descent moves against the derivative: a negative one pulls the token back.
    assert bool(-force(weighted, far) > 0.1) is row.keeps_pull
    # Beside that of the other token, which is r e^u / m, the force is floor * m * c(u).
    assert -force(floored, far) > 0.9 * FLOOR * BEHAVIOUR * COEFFICIENTS[estimator](far).abs()
    near = grid(-1e-3, 0, 1e-3)
    assert torch.equal(force(floored, near).sign(), near.sign())


def test_the_exact_weight_makes_a_well_of_finite_depth() -> None:
    """Its pull is largest at u = -1 and fades; under a floor it grows without bound."""
    u = torch.linspace(-25, 0, 2501, dtype=torch.float64)
    pull = -force(parse("k2@loss/is:token"), u)
    assert abs(u[pull.argmax()].item() + 1) < 0.5
    assert pull[0] < 1e-9 < 1e-2 < pull.max()
    floored = -force(parse(f"k2@loss/is:token/floor:{FLOOR}"), u)
    assert (floored.diff() < 0).all()


LEVELS = ("token", "sequence", "decision")


@pytest.mark.parametrize("level", LEVELS)
def test_a_floor_on_a_sum_over_later_tokens_moves_the_fixed_point(level: str) -> None:
    """The sum after this token is the same whichever token is drawn, so it must not move it; under a floor it does.

    With 5 nats to come the point without a force lies near u = -5, with 20 nats the token is gone.
    """
    exact = parse(f"k2@loss/horizon:sequence/is:{level}")
    floored = refused(f"k2@loss/horizon:sequence/is:{level}")
    at_reference = grid(0.0)
    for future, left in ((5.0, 0.01), (20.0, 1e-8)):
        assert force(exact, at_reference, future).abs() < 1e-13
        # By hand: (floor * m (1 - r) - (1 - r) r) * future = 0.08 * future.
        torch.testing.assert_close(force(floored, at_reference, future), at_reference + 0.08 * future)
        u = torch.linspace(0, -2 * future, 8001, dtype=torch.float64)
        pushed = force(floored, u, future) > 0
        stop = u[int((~pushed).float().argmax())].item()  # where descent from the reference comes to rest
        assert -future - 0.01 < stop < -future + 0.1
        assert torch.tensor(stop).exp() < left


def test_a_floor_on_a_product_of_weights_brings_back_states_that_the_policy_has_left() -> None:
    """Both tokens of the second state have a weight of 1, but the state is weighted 25 times too much."""
    left = torch.tensor([[0.01, 0.99]], dtype=torch.float64).log()
    problem = make_problem(2, 2, seed=1)
    later = problem.policies["current"][1].detach()
    problem = problem.with_policies(current=(left, later), sampler=(torch.zeros_like(left), later))

    def of_left_state(spec: KLSpec) -> Tensor:
        return loss_gradient(spec, problem, DATA)[2:4]

    exact = of_left_state(parse("k2@loss/is:prefix"))
    torch.testing.assert_close(of_left_state(refused("k2@loss/is:prefix")), 25 * exact, rtol=1e-10, atol=0)
    token, floored = (of_left_state(parse(f"k2@loss/is:token{floor}")) for floor in ("", f"/floor:{FLOOR}"))
    assert torch.equal(token, floored)


def test_a_floor_on_a_product_acts_on_most_tokens_of_a_long_response() -> None:
    """Ratios that a token weight's floor never touches: their product falls below the floor all the same."""
    random = torch.Generator().manual_seed(0)
    log_rho = 0.1 * torch.randn(32, 1000, generator=random, dtype=torch.float64) - 0.1**2 / 2
    logp = torch.zeros_like(log_rho)

    def share(spec: KLSpec) -> float:
        mask = torch.ones_like(logp).bool()
        return kl_term(spec, logp, logp - 0.1, mask, sampler_logp=logp - log_rho).metrics["kl/floor_frac"].item()

    assert share(parse("k2@loss/is:token/floor:0.5")) == 0
    assert share(refused("k2@loss/is:prefix")) > 0.5


@by_problem
def test_a_floor_gives_k1_a_force_that_knows_no_reference(problem: Problem) -> None:
    spec = refused("k1@loss/is:token/allow:biased", floor=0.9)
    assert loss_gradient(parse("k1@loss/is:token"), problem, DATA).norm() < 1e-14
    gradient = loss_gradient(spec, problem, DATA)
    assert gradient.norm() > 1e-2
    elsewhere = problem.with_policies(reference=problem.policies["current"])
    torch.testing.assert_close(loss_gradient(spec, elsewhere, DATA), gradient, rtol=TOLERANCE, atol=1e-14)


def test_a_registered_row_has_to_say_that_it_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimators, "_TABLE", dict(estimators._TABLE))
    register_estimator("quiet", f=lambda d: (d - 1) ** 2 / (d + 1))
    register_estimator("triangle", f=lambda d: (d - 1) ** 2 / (d + 1), restoring=True, keeps_pull=False)
    with pytest.raises(KLSpecError, match="sign of u") as caught:
        KLSpec.parse("quiet@loss/is:token/floor:0.5")
    assert "register_estimator" in caught.value.expected
    assert KLSpec.parse("triangle@loss/is:token/floor:0.5").floor == 0.5
