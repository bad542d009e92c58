"""The future sum against a plain double loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kl_plugins.horizon import future_sum


def double_loop(terms: Tensor, mask: Tensor, gamma: float) -> Tensor:
    result = torch.zeros_like(terms)
    for b in range(terms.shape[0]):
        for t in range(terms.shape[1]):
            power = 0
            for j in range(t + 1, terms.shape[1]):
                if mask[b, t] and mask[b, j]:
                    power += 1
                    result[b, t] += gamma**power * terms[b, j]
    return result


def test_by_hand() -> None:
    terms = torch.tensor([[1.0, 0.0, 2.0, 4.0, 0.0]])
    mask = torch.tensor([[True, False, True, True, False]])  # a hole (tool output), then padding
    assert future_sum(terms, mask, 1.0).tolist() == [[6.0, 0.0, 4.0, 0.0, 0.0]]
    assert future_sum(terms, mask, 0.5).tolist() == [[2.0, 0.0, 2.0, 0.0, 0.0]]
    assert future_sum(terms, mask, 0.0).tolist() == [[0.0, 0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("gamma", [1.0, 0.97, 0.5, 1e-3, 0.0])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 8, 9, 33])
def test_against_a_double_loop(length: int, gamma: float) -> None:
    generator = torch.Generator().manual_seed(length)
    terms = torch.randn(5, length, dtype=torch.float64, generator=generator)
    for share in (1.0, 0.6, 0.1, 0.0):
        mask = torch.rand(5, length, generator=generator) < share
        masked = terms.masked_fill(~mask, 0.0)
        torch.testing.assert_close(
            future_sum(masked, mask, gamma), double_loop(masked, mask, gamma), rtol=1e-12, atol=1e-13
        )


def test_a_huge_token_does_not_blur_the_ones_after_it() -> None:
    terms = torch.tensor([[1.0, 1e30, 3.0, 5.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    for gamma in (1.0, 1 - 1e-7):
        torch.testing.assert_close(future_sum(terms, mask, gamma), torch.tensor([[1e30, 8.0, 5.0, 0.0]]))


def test_no_rows() -> None:
    assert future_sum(torch.zeros(0, 5), torch.zeros(0, 5, dtype=torch.bool), 0.5).shape == (0, 5)
