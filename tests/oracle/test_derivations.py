"""Statements of the theory pages that need one state only: where forces vanish, and what a score of k2 or k3 does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.oracle.enumeration import Problem
from tests.support.oracle.expectation import loss_gradient, policy_gradient, weights
from tests.support.oracle.problems import MARGIN, TOLERANCE, bandit
from tests.support.oracle.specs import parse
from tests.support.oracle.targets import forward_kl, relative_error, reverse_kl


def moved(problem: Problem, logits: Tensor) -> Problem:
    return problem.with_policies(current=[logits[None]])


def near(problem: Problem, distance: float) -> Problem:
    """The policy, brought towards the reference in its logits."""
    (current,), (reference,) = problem.policies["current"], problem.policies["reference"]
    return moved(problem, (reference + distance * (current.detach() - reference))[0])


def test_of_one_action_k1_in_the_reward_is_k2_as_a_loss() -> None:
    problem = bandit()
    as_loss = loss_gradient(parse("k2@loss"), problem, "current", given=())
    assert relative_error(policy_gradient(parse("k1@reward"), problem), as_loss) < TOLERANCE


@pytest.mark.parametrize("text", ["k2@reward", "k3@reward"])
def test_k2_and_k3_in_the_reward_have_no_force_of_first_order(text: str) -> None:
    """A hundred times closer, the force is ten thousand times weaker; the right score's is a hundred times weaker."""
    far, close = near(bandit(), 1e-2), near(bandit(), 1e-4)
    wrong = policy_gradient(parse(text), far).norm() / policy_gradient(parse(text), close).norm()
    right = policy_gradient(parse("k1@reward"), far).norm() / policy_gradient(parse("k1@reward"), close).norm()
    assert wrong == pytest.approx(1e4, rel=0.05)
    assert right == pytest.approx(1e2, rel=0.05)


def test_reverse_minus_forward_has_no_lower_bound() -> None:
    reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    found = []
    for dropped in (1e-3, 1e-30, 1e-300):
        log_p = torch.tensor([0.6 * (1 - dropped), 0.4 * (1 - dropped), dropped], dtype=torch.float64).log()
        assert reverse_kl(log_p, reference) < 1
        found.append(float(reverse_kl(log_p, reference) - forward_kl(log_p, reference)))
    assert found[0] > found[1] > found[2]
    assert found[2] < -100


def test_the_optimum_under_a_forward_kl() -> None:
    """The policy is beta r / (lambda - R) in one state, where R - beta k3 has no gradient left."""
    problem, beta = bandit(), 0.5
    reward = torch.tensor([0.0, 1.0, 0.3, 0.7, 0.0, 0.1], dtype=torch.float64)
    reference = problem.distributions("reference")[0][0].exp()
    low, high = 1.0, 10.0  # lambda lies above the largest reward
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (beta * reference / (middle - reward)).sum() > 1 else (low, middle)
    there = moved(problem, (beta * reference / (low - reward)).log())
    gain = there.gradient((there.probabilities("current") * reward[there.tokens[:, 0]]).sum())
    assert gain.norm() > MARGIN
    assert (gain - beta * loss_gradient(parse("k3@loss"), there, "current", given=())).norm() < 1e-12


@pytest.mark.parametrize(
    "text", ["k2@loss", "k2@loss/is:token/floor:0.5", "jsd@loss/is:token/floor:1", "k3@loss/is:token"]
)
def test_the_reference_is_the_only_point_without_a_force(text: str) -> None:
    """From anywhere, descent along the expected force on data that stand still comes to the reference."""
    torch.manual_seed(0)
    for start in 3 * torch.randn(2, 6, dtype=torch.float64):
        problem = moved(bandit(), start)
        assert loss_gradient(parse(text), problem, "sampler").norm() > MARGIN
        for _ in range(3000):
            gradient = loss_gradient(parse(text), problem, "sampler")
            if gradient.norm() < 1e-9:
                break
            step = gradient / max(1.0, float(gradient.norm()))
            problem = moved(bandit(), (problem.policies["current"][0].detach()[0] - step))
        gap = problem.distributions("current")[0] - problem.distributions("reference")[0]
        assert gap.abs().max() < 1e-5, float(gap.abs().max())


def test_a_drawn_token_is_pushed_down_on_average() -> None:
    """The mean of the weighted coefficient of k2 is the KL, whoever drew the token."""
    problem = bandit()
    u = (problem.log_probs("current") - problem.log_probs("reference")).detach()
    mean = problem.expected((weights(problem, "sampler", "token") * u).sum(-1), "sampler")
    kl = reverse_kl(*(problem.distributions(name)[0][0] for name in ("current", "reference")))
    torch.testing.assert_close(mean, kl.detach())
    assert mean > 0.01
