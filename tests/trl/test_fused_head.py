"""Log-probs of further tokens out of TRL's fused head: their values and gradient, and TRL's own results unchanged."""

from typing import Any

import pytest
import torch
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction, chunked_logprob
from trl.trainer import utils

from kl_plugins.patches.trl import fused_head
from kl_plugins.top_k import TiledSearch
from tests.support.trl import kernels

N, D, V, K, CHUNK = 30, 16, 101, 7, 32
"""The tiles have 13 rows and 32 columns, so that the last ones are smaller than the others."""


@pytest.fixture(params=["torch", "kernels"], autouse=True)
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", 13)
    if request.param == "kernels":
        kernels.use(monkeypatch)


class Case:
    """Arguments of TRL's function, upstream gradients, and what plain torch makes of them."""

    def __init__(self, dtype: torch.dtype, softcap: float | None, scale: float, temperature: float) -> None:
        torch.manual_seed(0)
        self.leaves = [torch.randn(*shape).to(dtype).requires_grad_() for shape in ((N, D), (V, D), (V,))]
        self.labels, self.ids = torch.randint(0, V, (N,)), torch.rand(N, V).topk(K)[1]
        self.options = temperature, CHUNK, softcap, scale, ("entropy",)
        self.upstream = [torch.randn(N), torch.randn(N), torch.randn(N, K)]
        self._dtype, self._softcap, self._scale, self._temperature = dtype, softcap, scale, temperature

    @property
    def arguments(self) -> tuple[Any, ...]:
        return *self.leaves, self.labels, *self.options

    def total(self, logp: Tensor, entropy: Tensor, log_probs: Tensor) -> Tensor:
        return sum((given * part).sum() for given, part in zip(self.upstream, (logp, entropy, log_probs), strict=True))

    def plainly(self) -> tuple[list[Tensor], Tensor]:
        leaves = [leaf.detach().float().requires_grad_() for leaf in self.leaves]
        hidden, weight, bias = leaves
        logits = hidden @ weight.T
        logits = logits + (logits.to(self._dtype).float() - logits).detach() + bias
        logits = (logits + (logits.to(self._dtype).float() - logits).detach()) * self._scale
        logits = logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)
        every = (logits / self._temperature).log_softmax(-1)
        logp = every.gather(-1, self.labels[:, None])[:, 0]
        total = self.total(logp, -(every.exp() * every).sum(-1), every.gather(-1, self.ids))
        return list(torch.autograd.grad(total, leaves)), every.detach()


CASES = [
    (torch.float32, None, 1.0, 1.0),
    (torch.float32, 5.0, 0.7, 1.3),
    (torch.bfloat16, None, 1.0, 0.8),
]


def watched(case: Case, wanted: fused_head.Wanted) -> tuple[tuple[Any, ...], fused_head.Found]:
    seen: list[fused_head.Found] = []
    with fused_head.watched(lambda rows: wanted, seen.append):
        results = utils._ChunkedLogProbFunction.apply(*case.arguments)
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    return results, seen[0]


@pytest.mark.parametrize("given", CASES)
def test_log_probs_and_gradient_of_given_tokens(given: tuple[Any, ...]) -> None:
    case = Case(*given)
    results, (ids, log_probs, logp, draws) = watched(case, case.ids)
    assert draws is None
    expected, every = case.plainly()
    assert torch.equal(ids, case.ids)
    assert logp is results[0]
    torch.testing.assert_close(log_probs.detach(), every.gather(-1, case.ids), rtol=1e-5, atol=2e-5)
    gradients = torch.autograd.grad(case.total(logp, results[1], log_probs), case.leaves)
    limit = 1e-5 if given[0] == torch.float32 else 0.01
    for ours, plain in zip(gradients, expected, strict=True):
        assert (ours.float() - plain).norm() < limit * plain.norm()


@pytest.mark.parametrize("given", CASES)
def test_most_probable_tokens(given: tuple[Any, ...]) -> None:
    case = Case(*given)
    sought = torch.arange(N) % 5 > 0
    _, (ids, log_probs, _, draws) = watched(case, fused_head.MostProbable(K, sought))
    assert draws is None
    ids, log_probs, every = ids[sought], log_probs[sought], case.plainly()[1][sought]
    torch.testing.assert_close(log_probs.detach().sort(-1)[0], every.topk(K, -1)[0].sort(-1)[0], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(log_probs.detach(), every.gather(-1, ids), rtol=1e-5, atol=2e-5)
    assert all(len(set(row)) == K for row in ids.tolist())


def test_more_tokens_than_the_vocabulary_has_are_all_of_it() -> None:
    _, (ids, *_) = watched(Case(*CASES[0]), fused_head.MostProbable(2 * V, torch.ones(N, dtype=torch.bool)))
    assert torch.equal(ids.sort(-1)[0], torch.arange(V).expand(N, V))


@pytest.mark.parametrize("given", CASES)
def test_draws(given: tuple[Any, ...]) -> None:
    """They are those of a search in the final logits, in rows that are sought, with log-probs and the label's rate."""
    case, count = Case(*given), 400
    sought = torch.arange(N) % 5 > 0
    wanted = fused_head.MostProbable(K, sought, count, torch.Generator().manual_seed(0))
    _, (ids, log_probs, _, draws) = watched(case, wanted)
    assert draws is not None
    every = case.plainly()[1]
    assert ids.shape == log_probs.shape == (N, K + count)
    assert torch.equal(ids[:, K:], draws.ids)
    found = draws.log_rate < 1e4
    assert found[sought].float().mean() > 0.5
    torch.testing.assert_close(
        log_probs.detach()[:, K:][found & sought[:, None]],
        every.gather(-1, draws.ids)[found & sought[:, None]],
        rtol=1e-5,
        atol=2e-5,
    )
    whole = TiledSearch(K, case.labels, count, torch.Generator().manual_seed(0))
    for start in range(0, V, CHUNK):
        whole.add(every[:, start : start + CHUNK], start)
    expected = whole.draws.label_log_rate[sought]
    torch.testing.assert_close(draws.label_log_rate[sought], expected, rtol=1e-5, atol=2e-3)
    mean = (torch.where(found, draws.ids, 0).double().sum(-1) / found.sum(-1).clamp_min(1))[sought]
    other = whole.draws.log_rate < 1e4
    expected_mean = (torch.where(other, whole.draws.ids, 0).double().sum(-1) / other.sum(-1).clamp_min(1))[sought]
    assert (mean - expected_mean).abs().max() < 6 * V / 2 / (0.5 * count) ** 0.5


def test_no_row_that_is_sought() -> None:
    wanted = fused_head.MostProbable(K, torch.zeros(N, dtype=torch.bool), 3)
    _, (ids, log_probs, _, draws) = watched(Case(*CASES[0]), wanted)
    assert ids.shape == log_probs.shape == (N, K + 3)
    assert draws is not None
    assert draws.log_rate.shape == (N, 3)


@pytest.mark.parametrize("searched", [False, True], ids=["given", "searched"])
def test_no_row_at_all(searched: bool) -> None:
    """TRL scores a micro-batch in which nothing counts; its gradient is 0."""
    case = Case(*CASES[0])
    hidden, labels = case.leaves[0][:0], case.labels[:0]
    wanted = fused_head.MostProbable(K, labels.bool(), 3) if searched else case.ids[:0]
    seen: list[fused_head.Found] = []
    with fused_head.watched(lambda rows: wanted, seen.append):
        results = utils._ChunkedLogProbFunction.apply(hidden, *case.leaves[1:], labels, *case.options)
    (found,) = seen
    assert found.ids.shape == found.log_probs.shape == (0, K + 3 * searched)
    gradients = torch.autograd.grad(results[0].sum() + found.log_probs.sum(), case.leaves)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("given", CASES)
def test_results_and_gradient_of_trl_stay_the_same_bit_by_bit(given: tuple[Any, ...]) -> None:
    case = Case(*given)
    results, _ = watched(case, case.ids)
    own = ChunkedLogProbFunction.apply(*case.arguments)
    for ours, theirs in zip(results, own, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    gradients = [torch.autograd.grad(found[0].sum() + found[1].sum(), case.leaves) for found in (results, own)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


def test_another_source_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused_head.is_known()
    monkeypatch.setattr(ChunkedLogProbFunction, "backward", ChunkedLogProbFunction.forward)
    assert not fused_head.is_known()
