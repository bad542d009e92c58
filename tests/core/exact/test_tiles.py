"""However the work is cut: the same bits twice, the same numbers in any tiling, and no more memory than was allowed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kl_plugins import exact_kl, linear_kl
from kl_plugins.kernels.exact.linear import step_of
from tests.core.exact.linear_cases import gradients, heads
from tests.core.exact.support import make_rows, peak_bytes


def of_logits(**options: int) -> tuple[Tensor, ...]:
    rows = make_rows(33, 501)
    leaf = rows.logits.clone().requires_grad_()
    found = exact_kl(leaf, rows.ref_logits, rows.labels, **options)
    (found.kl - 0.5 * found.logp).sum().backward()
    assert leaf.grad is not None
    return (*(part.detach() for part in found), leaf.grad)


def test_rows_do_not_depend_on_their_tile() -> None:
    whole = of_logits()
    for tile in (1, 40_000, 100_000):
        for found, wanted in zip(of_logits(max_tile_bytes=tile), whole, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mode", ["autograd", "loss"])
def test_tokens_do_not_depend_on_their_tile(mode: str) -> None:
    given, weights = heads(), torch.linspace(0.1, 1.0, 40)
    kl, whole = gradients(given, weights, mode)
    for tile in (1, 10_000, 30_000):
        same_kl, found = gradients(given, weights, mode, max_tile_bytes=tile)
        # Products of other shapes round otherwise, and a KL of 1e-3 shows the logits' last digits.
        torch.testing.assert_close(same_kl, kl, rtol=2e-4, atol=1e-7)
        for name in ("hidden", "weight"):
            torch.testing.assert_close(found[name], whole[name], rtol=2e-3, atol=1e-5)


def test_two_runs_are_the_same_bits() -> None:
    assert all(torch.equal(one, other) for one, other in zip(of_logits(), of_logits(), strict=True))
    given, weights = heads(), torch.linspace(0.1, 1.0, 40)
    for mode in ("autograd", "loss"):
        (kl, one), (same_kl, other) = (gradients(given, weights, mode, max_tile_bytes=10_000) for _ in range(2))
        assert torch.equal(kl, same_kl)
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("tile", [2**20, 2**22])
def test_logits_cost_one_gradient_and_the_tile(tile: int) -> None:
    rows = make_rows(256, 4000)
    leaf = rows.logits.clone().requires_grad_()
    size = leaf.numel() * 4

    def forward() -> Tensor:
        return exact_kl(leaf, rows.ref_logits, rows.labels, backend="eager", max_tile_bytes=tile).kl.sum()

    small = 256 * 8 * 40
    assert peak_bytes(forward) < tile + small
    loss = forward()
    found = peak_bytes(loss.backward)
    assert size <= found < size + tile + small


@pytest.mark.parametrize("mode", ["autograd", "loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_cost_their_gradients_and_the_tile(mode: str, dtype: torch.dtype) -> None:
    tokens, width, vocabulary, tile = 512, 64, 4000, 2**21
    given, weights = heads(tokens, width, vocabulary, dtype=dtype), torch.rand(tokens)
    live = {name: given[name].clone().requires_grad_() for name in ("hidden", "weight")}
    # Gradients, and the weight's in float32 before it is rounded.
    results = (tokens + vocabulary) * width * dtype.itemsize + vocabulary * width * (4 if dtype != torch.float32 else 0)
    # A loss's gradients wait for the upstream one, which gives them once more.
    results += (tokens + vocabulary) * width * dtype.itemsize if mode == "loss" else 0
    small = tokens * (8 * 30)

    def run() -> None:
        arguments = {**given, **live}
        if mode == "loss":
            linear_kl(**arguments, kl_weight=weights, max_tile_bytes=tile, backend="eager").loss.backward()
        else:
            (linear_kl(**arguments, max_tile_bytes=tile, backend="eager").kl * weights).sum().backward()

    naive = 6 * tokens * vocabulary * 4
    found = peak_bytes(run)
    assert found < results + tile + small
    assert found < naive / 10


@pytest.mark.parametrize(
    ("count", "most", "multiple", "step"),
    [(8192, 525, 128, 512), (8192, 500, 128, 384), (1000, 525, 128, 512), (100, 525, 128, 100), (100, 60, 128, 50),
     (10, 0, 1, 1), (0, 5, 1, 1), (10, 4, 1, 4), (10, 9, 1, 5)],
)  # fmt: skip
def test_tiles_are_of_one_size_that_the_products_like(count: int, most: int, multiple: int, step: int) -> None:
    assert step_of(count, most, multiple) == step
