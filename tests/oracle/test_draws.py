"""Draws of the reference beside its most probable tokens: unbiased whatever their probabilities, and less noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kl_plugins import RefTopK, exact_kl, linear_kl
from kl_plugins.exact import TopKKL
from kl_plugins.kernels.exact.reference import RefDraws
from kl_plugins.top_k import log_odds, reference_of, top_and_drawn_tokens, top_k_kl

VOCABULARY, SET = 6, (4, 1)
RATES = {
    "as the tail": torch.tensor([0.3, 0.0, 0.2, 0.1, 0.0, 0.4]),
    "far from it": torch.tensor([0.01, 0.0, 0.01, 0.97, 0.0, 0.01]),
    "some are never drawn": torch.tensor([0.5, 0.0, 0.0, 0.5, 0.0, 0.0]),
    "often nothing is found": torch.tensor([0.1, 0.0, 0.1, 0.0, 0.0, 0.1]),
}
"""Probabilities of each token to be drawn; what is missing to 1 is the chance to find nothing."""
DRAWS = (1, 3, 20)


def distributions() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of policy and reference, and probabilities of a sampler, float64."""
    torch.manual_seed(1)
    logits, ref_logits, sampler = torch.randn(3, VOCABULARY).double()
    return logits, ref_logits, sampler.softmax(-1)


FORMS = ("logits", "log-probs", "head")
"""The same function: from all logits, from log-probs of the set, the draws and the drawn token, and from a head."""


def from_logits(leaf: Tensor, labels: Tensor, form: str, reference: RefTopK, ref_logp: Tensor) -> TopKKL:
    given: dict[str, Any] = {"reference": reference, "ref_logp": ref_logp}
    if form == "logits":
        return exact_kl(leaf, None, labels, **given)
    if form == "head":
        return linear_kl(leaf, torch.eye(leaf.shape[-1], dtype=leaf.dtype), None, None, labels, **given)
    logp = leaf.log_softmax(-1).gather(-1, labels.clamp_min(0)[:, None])[:, 0]
    return top_k_kl(log_odds(leaf, labels, reference.tokens) + logp[:, None], logp, labels, **given)


def estimates(
    logits: Tensor, ref_logits: Tensor, chance: Tensor, count: int, form: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kl (V, V) and remainder (V,), and the gradients (V, V, V) and (V, V), of each label with each single draw.

    The first index is the label and the second is the draw. One draw stands for each of `count`.
    """
    labels = torch.arange(VOCABULARY).repeat_interleave(VOCABULARY)
    drawn = torch.arange(VOCABULARY).repeat(VOCABULARY)
    leaf = logits.repeat(VOCABULARY**2, 1).requires_grad_()
    ref = ref_logits.log_softmax(-1)
    rate = (count * chance.double()).log().clamp_min(-1e4)
    rest = torch.ones(VOCABULARY, dtype=torch.bool).index_fill(0, torch.tensor(SET), False)
    tail = ref.masked_fill(~rest, -torch.inf).logsumexp(-1)
    n, ids = VOCABULARY**2, torch.tensor(SET)
    draws = RefDraws(drawn[:, None], ref[drawn][:, None], rate[drawn][:, None], rate[labels])
    reference = RefTopK(ids.expand(n, -1), ref[ids].expand(n, -1), tail.expand(n), 1.0, draws)
    found = from_logits(leaf, labels, form, reference, ref[labels])
    (own,) = torch.autograd.grad(found.kl.sum(), leaf, retain_graph=True)
    (sampled,) = torch.autograd.grad((found.remainder * found.logp).sum(), leaf)
    square = (VOCABULARY, VOCABULARY)
    return (
        found.kl.detach().view(square), found.remainder.view(square)[:, 0],
        own.view(*square, -1), sampled.view(*square, -1)[:, 0],
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", DRAWS)
@pytest.mark.parametrize("chance", RATES.values(), ids=RATES)
@pytest.mark.parametrize("sampler", [False, True], ids=["on-policy", "other data"])
def test_unbiased_for_every_distribution_of_the_draws(chance: Tensor, count: int, sampler: bool, form: str) -> None:
    logits, ref_logits, behaviour = distributions()
    kl, remainder, own, sampled = estimates(logits, ref_logits, chance, count, form)
    p, u = logits.softmax(-1), logits.log_softmax(-1) - ref_logits.log_softmax(-1)
    exact, ids = (p * u).sum(), torch.tensor(SET)
    rest = torch.ones(VOCABULARY, dtype=torch.bool).index_fill(0, ids, False)
    level = (p[rest].sum() / ref_logits.softmax(-1)[rest].sum()).log()
    cells = (p * u)[ids].sum() + p[rest].sum() * level
    ours = u.masked_fill(rest, 0.0) + level * rest
    of_cells = p * (ours - cells)
    data, weight = (behaviour, p / behaviour) if sampler else (p, torch.ones_like(p))
    chance = chance.double()
    value = cells + count * (chance * (kl[0] - cells)).sum() + (data * weight * remainder).sum()
    assert torch.allclose(value, exact, atol=1e-13)
    added = (chance[:, None] * (own[0] - of_cells)).sum(0) * count
    gradient = of_cells + added + (data[:, None] * weight[:, None] * sampled).sum(0)
    assert torch.allclose(gradient, p * (u - exact), atol=1e-13)
    assert torch.allclose(own[0], own[3], atol=1e-15)  # the label has no part in it


@pytest.mark.parametrize("form", FORMS)
def test_the_draws_of_the_library_give_the_exact_gradient_on_average(form: str) -> None:
    """All of it together, with many draws: the error is that of an average, and much smaller with more draws."""
    torch.manual_seed(2)
    vocabulary, k, rows = 120, 4, 3
    ref_logits = torch.randn(rows, vocabulary).double()
    logits = ref_logits + torch.randn(rows, vocabulary) / 2
    labels = ref_logits.topk(k).indices[:, 1]  # in the set, so the label has no part
    exact_leaf = logits.clone().requires_grad_()
    p, u = exact_leaf.softmax(-1), exact_leaf.log_softmax(-1) - ref_logits.log_softmax(-1)
    exact = (p * u).sum(-1)
    (expected,) = torch.autograd.grad(exact.sum(), exact_leaf)
    ref = ref_logits.log_softmax(-1)
    errors = []
    for count in (200, 20_000):
        generator = torch.Generator().manual_seed(count)
        ids, draws = top_and_drawn_tokens(ref_logits, labels, k, count, generator=generator)
        log_probs = ref.gather(-1, torch.cat([ids, draws.ids], -1))
        reference = reference_of(ids, log_probs, vocabulary, draws=draws)
        ref_logp = ref.gather(-1, labels[:, None])[:, 0]
        leaf = logits.clone().requires_grad_()
        found = from_logits(leaf, labels, form, reference, ref_logp)
        (own,) = torch.autograd.grad(found.kl.sum(), leaf)
        errors.append(float((own - expected).norm() / expected.norm()))
        assert (found.kl - exact).abs().max() < 5 / count**0.5
    assert errors[1] < min(0.1, errors[0] / 4)  # 0.46 and 0.06 were seen


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hostile_numbers(dtype: torch.dtype, form: str) -> None:
    """Left-out rows may hold anything. A draw without mass under the policy, or that found nothing, adds nothing."""
    n, k, m, vocabulary = 5, 2, 3, 7
    labels = torch.tensor([-100, 6, 6, 6, 0])
    logits = torch.linspace(-2, 2, n * vocabulary, dtype=dtype).view(n, vocabulary)
    logits[0] = torch.nan
    logits[1, 4] = -1e30 if form == "head" else -torch.inf  # a product with an infinity is NaN
    logits[2] = torch.linspace(-3e4, 3e4, vocabulary)
    ids, drawn = torch.tensor([0, 1]).expand(n, -1), torch.tensor([2, 4, 0]).expand(n, -1)
    rate = torch.tensor([-1e4, 0.3, 1e4], dtype=dtype).repeat(n, 1)
    minus = torch.full((n, m), -3.0, dtype=dtype)
    minus[1, 1] = -torch.inf  # as the policy's own, so that the log-ratio is NaN
    minus[3] = -1e30
    own = torch.full((n,), -2.0, dtype=dtype)
    minus[0] = rate[0] = own[0] = torch.nan
    kept = torch.full((n, k), -1.0, dtype=dtype)
    tail = torch.full((n,), -1.5, dtype=dtype)
    reference = RefTopK(ids, kept, tail, 1.0, RefDraws(drawn, minus, rate, own))
    leaf = logits.clone().requires_grad_()
    ref_logp = torch.full((n,), -2.5, dtype=dtype)
    found = from_logits(leaf, labels, form, reference, ref_logp)
    assert torch.isfinite(found.kl).all()
    assert torch.isfinite(found.remainder).all()
    assert found.kl[0] == 0 == found.remainder[0]
    if form != "log-probs":
        (gradient,) = torch.autograd.grad(found.kl.sum(), leaf)
        assert torch.isfinite(gradient).all()
        assert not gradient[0].any()
    else:  # the trainer's own log_softmax of a row of NaN has no finite gradient
        (gradient,) = torch.autograd.grad(found.kl[1:].sum(), leaf)
        assert torch.isfinite(gradient[1:]).all()
