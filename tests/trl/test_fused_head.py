"""Log-probs of further tokens out of TRL's fused head: their values and gradient, and TRL's own results unchanged."""

from typing import Any

import pytest
import torch
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction, chunked_logprob
from trl.trainer import utils

from kl_plugins.patches.trl import fused_head
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


def watched(case: Case, wanted: fused_head.Wanted) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
    seen: list[tuple[Tensor, ...]] = []
    with fused_head.watched(lambda rows: wanted, lambda *given: seen.append(given)):
        results = utils._ChunkedLogProbFunction.apply(*case.arguments)
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    return results, seen[0]


@pytest.mark.parametrize("given", CASES)
def test_log_probs_and_gradient_of_given_tokens(given: tuple[Any, ...]) -> None:
    case = Case(*given)
    results, (ids, log_probs, logp) = watched(case, case.ids)
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
    _, (ids, log_probs, _) = watched(case, fused_head.MostProbable(K, sought))
    ids, log_probs, every = ids[sought], log_probs[sought], case.plainly()[1][sought]
    torch.testing.assert_close(log_probs.detach().sort(-1)[0], every.topk(K, -1)[0].sort(-1)[0], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(log_probs.detach(), every.gather(-1, ids), rtol=1e-5, atol=2e-5)
    assert all(len(set(row)) == K for row in ids.tolist())


def test_more_tokens_than_the_vocabulary_has_are_all_of_it() -> None:
    _, (ids, _, _) = watched(Case(*CASES[0]), fused_head.MostProbable(2 * V, torch.ones(N, dtype=torch.bool)))
    assert torch.equal(ids.sort(-1)[0], torch.arange(V).expand(N, V))


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
