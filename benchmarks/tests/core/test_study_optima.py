"""The two fixed points of the study, against enumeration of a tree made by hand."""

import pytest
import torch

from benchmarks.study.stale.optima import Depth, fixed_point

BETA = 0.2
torch.manual_seed(0)
FIRST, SECOND = torch.randn(1, 3, dtype=torch.float64).log_softmax(-1), torch.randn(2, 3, dtype=torch.float64)
SECOND = SECOND.log_softmax(-1)
REWARD = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64)


def depths():
    """Token 2 ends a completion at once; tokens 0 and 1 are followed by one more."""
    kept, nothing = torch.ones(2, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.float64)
    nothing[0, 2] = 0.3
    above, below = torch.zeros(1, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    return [
        Depth(FIRST, above, above, nothing, kept[:1]),
        Depth(SECOND, below, torch.tensor([0, 1]), REWARD, kept),
    ]


def completions():
    """Probability under the reference and reward of all seven."""
    both = FIRST[0, :2, None] + SECOND
    return torch.cat([both.flatten(), FIRST[0, 2:]]).exp(), torch.cat([REWARD.flatten(), torch.tensor([0.3])])


def test_optimum_is_the_reference_reweighted():
    r, rewards = completions()
    p = r * (rewards / BETA).exp()
    p = p / p.sum()
    found = fixed_point(depths(), BETA, sequence=True)
    assert found["reward"] == pytest.approx(float(p @ rewards))
    assert found["kl"] == pytest.approx(float(p @ (p / r).log()))
    assert found["objective"] == pytest.approx(BETA * float((r @ (rewards / BETA).exp()).log()))


def test_token_local_point_draws_by_what_the_policy_itself_expects():
    last = (SECOND + REWARD / BETA).softmax(-1)
    expected = torch.cat([(last * REWARD).sum(-1), torch.tensor([0.3])])
    first = (FIRST[0] + expected / BETA).softmax(-1)
    found = fixed_point(depths(), BETA, sequence=False)
    assert found["reward"] == pytest.approx(float(first @ expected))
    kl = (first * (first.log() - FIRST[0])).sum() + (first[:2, None] * last * (last.log() - SECOND)).sum()
    assert found["kl"] == pytest.approx(float(kl))


def test_token_local_point_lies_below_the_optimum_and_further_out():
    optimum, local = (fixed_point(depths(), BETA, sequence) for sequence in (True, False))
    assert local["objective"] < optimum["objective"]
    assert local["kl"] > optimum["kl"]
