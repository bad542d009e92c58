"""The exact KL from hidden states on a GPU: mixed products, and tiles whose gradients wait for one product."""

from __future__ import annotations

import pytest
import torch

from tests.core.exact.linear_cases import gradients, heads
from tests.core.exact.support import norm_error

pytestmark = pytest.mark.gpu

TOKENS, WIDTH, VOCABULARY = 3000, 256, 6000


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("rows", [300, 1000, None], ids=["several groups", "one group", "one tile"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["autograd", "loss"])
def test_agrees_with_the_textbook(mode: str, dtype: torch.dtype, rows: int | None, ignored: bool) -> None:
    given = {name: value.cuda() for name, value in heads(TOKENS, WIDTH, VOCABULARY, dtype=dtype).items()}
    weights = torch.linspace(0.1, 1.0, TOKENS, device="cuda")
    if ignored:
        weights[::7] = 0.0
    kl, found = gradients(
        {**given, "labels": given["labels"].masked_fill(weights == 0, -100)},
        weights,
        mode,
        max_tile_bytes=None if rows is None else rows * VOCABULARY * 16,
    )
    true_kl, wanted = gradients(given, weights, "textbook")
    assert norm_error(kl, true_kl * (weights != 0)) < 1e-4
    for name in ("hidden", "weight"):
        assert norm_error(found[name], wanted[name].double()) < 5e-3, name


def test_the_products_that_the_library_counts_on_are_there() -> None:
    from kl_plugins.kernels.exact import products

    assert products._mixed_products("cuda")
    assert products._adds_mixed("cuda")
