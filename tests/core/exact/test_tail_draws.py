"""Draws of the reference: never among its most probable tokens, and as often as they say."""

import pytest
import torch
from torch import Tensor

from kl_plugins import linear_reference_top_k, reference_top_k
from kl_plugins.kernels.exact.tail_draws import NOTHING
from kl_plugins.top_k import Draws, log_odds, tokens_in_runs, top_and_drawn_tokens
from tests.core.exact.support import check_rates

INF, NAN = float("inf"), float("nan")
VOCABULARIES = [12, 37, 300, 1029]
K, MANY = 4, 40_000


def row(vocabulary: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 2).to(dtype)


def rates(logits: Tensor, k: int = K) -> Tensor:
    """Probability of each token of a row (V,) to be drawn: asked for each token as the label."""
    vocabulary = logits.shape[-1]
    every = torch.arange(vocabulary)
    _, draws = top_and_drawn_tokens(logits.expand(vocabulary, -1), every, k, 1)
    return draws.label_log_rate.double().exp()


def drawn(logits: Tensor, count: int, k: int = K, seed: int = 0) -> tuple[Tensor, Draws]:
    generator = torch.Generator().manual_seed(seed)
    return top_and_drawn_tokens(logits, torch.zeros(logits.shape[:-1]).long(), k, count, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_tokens_are_drawn_as_often_as_they_say(vocabulary: int, dtype: torch.dtype) -> None:
    logits = row(vocabulary, dtype)
    chance = rates(logits)
    ids, draws = drawn(logits, MANY)
    check_rates(draws, chance, ids)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_probable_tokens_are_drawn_more_often(vocabulary: int) -> None:
    """A flat distribution, or one that takes the wrong logits, would also be unbiased, but not useful."""
    logits = row(vocabulary)
    chance = rates(logits)
    tail = logits.softmax(-1).index_fill(0, drawn(logits, 1)[0], 0.0).double()
    tail = tail / tail.sum()

    def noise(rate: Tensor) -> float:
        # Beside a label, which is drawn at a tenth of the rate.
        return float((tail.square() / (0.1 * tail + rate + 1e-12)).sum())

    flat = torch.full_like(tail, 1 / vocabulary)
    assert noise(chance) - noise(tail) < (noise(flat) - noise(tail)) / 2


def test_a_whole_vocabulary_has_nothing_to_draw() -> None:
    ids, draws = drawn(torch.randn(3, 5), 2, k=8)
    assert ids.shape == (3, 5)
    assert (draws.log_rate == NOTHING).all()
    assert not draws.ids.any()
    assert (draws.label_log_rate == -NOTHING).all()


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_hostile_logits(vocabulary: int) -> None:
    """Tokens that cannot be chosen are not drawn, ties draw nothing, and no result is NaN."""
    rows = torch.full((5, vocabulary), -INF)
    rows[0, :7] = torch.arange(7.0)
    rows[1, 3] = INF
    rows[2] = 2.0
    rows[3] = NAN
    rows[4] = torch.linspace(-3e38, 3e38, vocabulary)
    _, draws = drawn(rows, 6)
    for part in draws:
        assert torch.isfinite(part).all()
    assert set(draws.ids[0].tolist()) <= {0, 1, 2}
    for index in (2, 3):
        assert (draws.log_rate[index] == NOTHING).all()


def test_the_same_generator_gives_the_same_draws_and_leaves_torchs_own_alone() -> None:
    logits, state = torch.randn(7, 300), torch.random.get_rng_state()
    first, second, third = (drawn(logits, 5, seed=seed)[1] for seed in (1, 1, 2))
    assert torch.equal(first.ids, second.ids)
    assert not torch.equal(first.ids, third.ids)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_positions_have_draws_of_their_own() -> None:
    _, draws = drawn(row(300).expand(2, 50, -1), 4)
    assert draws.ids.shape == (2, 50, 4)
    assert draws.label_log_rate.shape == (2, 50)
    assert len(draws.ids.flatten(0, 1).unique(dim=0)) > 50


def test_numbers_that_are_invalid() -> None:
    for k, count in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            drawn(torch.randn(2, 9), count, k=k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_runs_of_rows_have_the_tokens_of_a_copy(vocabulary: int, dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    logits = torch.randn(30, vocabulary).to(dtype)
    runs = [slice(2, 9), slice(9, 10), slice(20, 30)]
    rows = torch.cat([logits[run] for run in runs])
    labels = torch.randint(-1, vocabulary, (len(rows),))
    ids, draws = top_and_drawn_tokens(rows, labels, K, 5, generator=torch.Generator().manual_seed(3))
    given = logits, runs, labels, K
    found, drawn, odds = tokens_in_runs(*given, 5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(found, ids)
    assert drawn is not None
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(drawn, draws, strict=True))
    torch.testing.assert_close(odds, log_odds(rows, labels, torch.cat([ids, draws.ids], -1)))
    found, drawn, odds = tokens_in_runs(*given)
    assert torch.equal(found, ids)
    assert drawn is None
    torch.testing.assert_close(odds, log_odds(rows, labels, ids))


def test_no_run_of_rows() -> None:
    ids, draws, odds = tokens_in_runs(torch.randn(4, 300), [], torch.zeros(0).long(), K, 2)
    assert ids.shape == (0, K)
    assert odds.shape == (0, K + 2)
    assert draws is not None
    assert draws.log_rate.shape == (0, 2)
    for labels, k in ((torch.zeros(2).long(), K), (torch.zeros(3).long(), 0)):
        with pytest.raises(ValueError, match="labels for 3 rows"):
            tokens_in_runs(torch.randn(4, 300), [slice(1, 4)], labels, k)


@pytest.mark.parametrize("tile", [None, 4_000])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.6, None), (1.7, 4.0)])
def test_a_reference_from_logits_has_these_draws(tile: int | None, temperature: float, softcap: float | None) -> None:
    torch.manual_seed(4)
    logits = torch.randn(2, 9, 300).double() * 3
    labels = torch.randint(300, (2, 9))
    whole = (softcap * torch.tanh(logits / softcap) if softcap else logits) / temperature
    seed = torch.Generator().manual_seed(1)
    given = {"labels": labels, "draws": 5, "generator": seed, "max_tile_bytes": tile}
    found = reference_top_k(logits, K, temperature=temperature, softcap=softcap, **given)
    assert found.draws is not None
    log_probs = whole.log_softmax(-1)
    hit = found.draws.log_rate < NOTHING
    assert hit.float().mean() > 0.5
    assert torch.allclose(found.draws.logp[hit], log_probs.gather(-1, found.draws.ids)[hit], atol=1e-12)
    if tile is None:
        ids, draws = top_and_drawn_tokens(whole, labels, K, 5, generator=torch.Generator().manual_seed(1))
        assert torch.equal(found.ids, ids)
        assert torch.equal(found.draws.ids, draws.ids)
        assert torch.allclose(found.draws.log_rate, draws.log_rate, atol=1e-9)
        assert torch.allclose(found.draws.label_log_rate, draws.label_log_rate, atol=1e-9)


def test_a_reference_without_states_or_labels() -> None:
    found = reference_top_k(torch.zeros(0, 9), 2, labels=torch.zeros(0).long(), draws=3)
    assert found.draws is not None
    assert [tuple(part.shape) for part in found.draws] == [(0, 3), (0, 3), (0, 3), (0,)]
    assert reference_top_k(torch.zeros(2, 9), 2).draws is None
    for labels in (None, torch.zeros(3).long()):
        with pytest.raises(ValueError, match=r"draws need labels \(2,\)"):
            reference_top_k(torch.zeros(2, 9), 2, labels=labels, draws=1)


@pytest.mark.parametrize("tile", [None, 30_000])
def test_a_reference_from_hidden_states_has_them_as_well(tile: int | None) -> None:
    torch.manual_seed(5)
    hidden, weight, bias = torch.randn(2, 40, 8).double(), torch.randn(300, 8).double(), torch.randn(300).double()
    labels = torch.randint(300, (2, 40))
    given = {"labels": labels, "draws": 4, "temperature": 0.7, "softcap": 9.0}
    logits = hidden @ weight.T + bias
    found = linear_reference_top_k(
        hidden, weight, K, bias=bias, generator=torch.Generator().manual_seed(2), max_tile_bytes=tile, **given
    )
    expected = reference_top_k(logits, K, generator=torch.Generator().manual_seed(2), **given)
    assert found.draws is not None
    assert expected.draws is not None
    assert torch.equal(found.ids, expected.ids)
    assert torch.allclose(found.draws.label_log_rate, expected.draws.label_log_rate, atol=1e-9)
    log_probs = (9 * torch.tanh(logits / 9) / 0.7).log_softmax(-1)
    hit = found.draws.log_rate < NOTHING
    assert torch.allclose(found.draws.logp[hit], log_probs.gather(-1, found.draws.ids)[hit], atol=1e-10)
    if tile is None:
        assert torch.equal(found.draws.ids, expected.draws.ids)
