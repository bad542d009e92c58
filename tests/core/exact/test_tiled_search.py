"""A search tile by tile finds what a search in all logits finds, and draws as often as it says."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kl_plugins.kernels.exact.tail_draws import NOTHING
from kl_plugins.top_k import Draws, TiledSearch, top_and_drawn_tokens, top_tokens
from tests.core.exact.support import check_rates

INF, NAN = float("inf"), float("nan")
VOCABULARY, K, MANY = 300, 4, 40_000
WIDTHS = [300, 128, 37, 3]
"""Tiles of the whole vocabulary, with a rest, of an odd size, and with fewer tokens than are looked for."""


def row(dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(3)) * 2).to(dtype)


def searched(
    logits: Tensor,
    labels: Tensor,
    width: int,
    draws: int,
    k: int = K,
    seed: int = 0,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> TiledSearch:
    search = TiledSearch(k, labels, draws, torch.Generator().manual_seed(seed), transform)
    for start in range(0, logits.shape[-1], width):
        search.add(logits[:, start : start + width], start)
    return search


def rates(logits: Tensor, width: int) -> Tensor:
    """Probability of each token of a row (V,) to be drawn: asked for each token as the label."""
    every = torch.arange(len(logits))
    return searched(logits.expand(len(logits), -1), every, width, 1).draws.label_log_rate.double().exp()


def drawn(logits: Tensor, width: int, count: int, k: int = K, seed: int = 0) -> tuple[TiledSearch, Draws]:
    search = searched(logits, torch.zeros(len(logits)).long(), width, count, k, seed)
    return search, search.draws


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_most_probable_tokens_are_those_of_all_logits(width: int, dtype: torch.dtype) -> None:
    logits = torch.randn(20, VOCABULARY, generator=torch.Generator().manual_seed(1)).to(dtype)
    search = searched(logits, torch.zeros(20).long(), width, 0)
    assert search.logits.dtype == dtype
    assert torch.equal(search.logits, logits.gather(-1, top_tokens(logits, K)))
    assert torch.equal(search.logits, logits.gather(-1, search.tokens))
    assert search.draws.ids.shape == (20, 0)
    assert (search.draws.label_log_rate == -NOTHING).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
def test_tokens_are_drawn_as_often_as_they_say(width: int, dtype: torch.dtype) -> None:
    logits = row(dtype)
    chance = rates(logits, width)
    search, draws = drawn(logits[None], width, MANY)
    found = draws.log_rate < NOTHING
    top, logit = search.tokens[0, :K], search.logits[0, K:]
    assert torch.equal(search.tokens[:, K:][found], draws.ids[found])
    assert torch.equal(logit[found[0]], logits[draws.ids[found]])
    check_rates(draws, chance, top)


@pytest.mark.parametrize("width", WIDTHS)
def test_tiles_do_not_make_draws_worse(width: int) -> None:
    """Tokens that were among the best for a while are drawn as well; without them a third of the tail would be lost."""
    logits = row()
    tail = logits.softmax(-1).index_fill(0, top_tokens(logits, K), 0.0).double()
    tail = tail / tail.sum()

    def noise(rate: Tensor) -> float:
        # Beside a label, which is drawn at a tenth of the rate.
        return float((tail.square() / (0.1 * tail + rate + 1e-12)).sum())

    whole = top_and_drawn_tokens(logits.expand(VOCABULARY, -1), torch.arange(VOCABULARY), K, 1)[1]
    assert noise(rates(logits, width)) < 1.1 * noise(whole.label_log_rate.double().exp())


@pytest.mark.parametrize("width", WIDTHS)
def test_final_logits_decide_the_rates(width: int) -> None:
    logits = row().expand(VOCABULARY, -1)
    every = torch.arange(VOCABULARY)
    given = searched(logits * 0.5, every, width, 1, transform=lambda z: 4 * torch.tanh(z / 2))
    expected = searched(4 * torch.tanh(logits / 4), every, width, 1)
    torch.testing.assert_close(given.draws.label_log_rate, expected.draws.label_log_rate, rtol=1e-5, atol=1e-4)


def test_draws_are_independent_of_each_other() -> None:
    """All draws of a row must not change over to a new tile together."""
    _, draws = drawn(row().expand(4_000, -1), 37, 2)
    first, second = ((draws.ids[:, index] < 150).double() for index in (0, 1))
    assert abs(float(((first - first.mean()) * (second - second.mean())).mean())) < 6 * 0.25 / 4_000**0.5


def test_rows_have_draws_of_their_own() -> None:
    _, draws = drawn(row().expand(50, -1), 37, 4)
    assert len(draws.ids.unique(dim=0)) > 45
    again, other = (drawn(row().expand(50, -1), 37, 4, seed=seed)[1].ids for seed in (0, 1))
    assert torch.equal(draws.ids, again)
    assert not torch.equal(draws.ids, other)


@pytest.mark.parametrize("width", [12, 5, 2])
def test_a_whole_vocabulary_has_nothing_to_draw(width: int) -> None:
    search, draws = drawn(torch.randn(3, 12), width, 2, k=16)
    assert search.tokens.shape == (3, 14)
    assert torch.equal(search.tokens[:, :12].sort(-1)[0], torch.arange(12).expand(3, -1))
    assert (draws.log_rate == NOTHING).all()
    assert not draws.ids.any()
    assert (draws.label_log_rate == -NOTHING).all()


def test_no_rows() -> None:
    search, draws = drawn(torch.zeros(0, 40), 16, 3)
    assert search.tokens.shape == search.logits.shape == (0, K + 3)
    assert draws.log_rate.shape == (0, 3)


@pytest.mark.parametrize("width", WIDTHS)
def test_hostile_logits(width: int) -> None:
    """Tokens that cannot be chosen are not drawn, ties draw nothing, and no result is NaN."""
    rows = torch.full((7, VOCABULARY), -INF)
    rows[0, 93:100] = torch.arange(7.0)
    rows[1, 3] = INF
    rows[2] = 2.0
    rows[3] = NAN
    rows[4] = torch.linspace(-3e38, 3e38, VOCABULARY)
    rows[5:] = torch.linspace(3e4, -3e4, VOCABULARY)
    rows[6, 1] = NAN
    search, draws = drawn(rows, width, 6)
    for part in draws:
        assert torch.isfinite(part).all()
    found = draws.log_rate < NOTHING
    assert set(draws.ids[0][found[0]].tolist()) <= {93, 94, 95}
    assert not found[1].any()
    assert not found[3].any()
    for index in (0, 2, 4, 5):
        assert not torch.isin(draws.ids[index][found[index]], search.tokens[index, :K]).any()
