"""Draws of the reference beside its most probable tokens: unbiased whatever their probabilities, and less noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kl_plugins import RefTopK
from kl_plugins.kernels.exact.reference import RefDraws
from kl_plugins.top_k import log_odds, top_k_kl

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


def estimates(logits: Tensor, ref_logits: Tensor, chance: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kl (V, V) and remainder (V,), and the gradients (V, V, V) and (V, V), of each label with each single draw.

    The first index is the label and the second is the draw. One draw stands for each of `count`.
    """
    labels = torch.arange(VOCABULARY).repeat_interleave(VOCABULARY)
    drawn = torch.arange(VOCABULARY).repeat(VOCABULARY)
    leaf = logits.repeat(VOCABULARY**2, 1).requires_grad_()
    logp = leaf.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    ref = ref_logits.log_softmax(-1)
    rate = (count * chance.double()).log().clamp_min(-1e4)
    rest = torch.ones(VOCABULARY, dtype=torch.bool).index_fill(0, torch.tensor(SET), False)
    tail = ref.masked_fill(~rest, -torch.inf).logsumexp(-1)
    n, ids = VOCABULARY**2, torch.tensor(SET)
    draws = RefDraws(drawn[:, None], ref[drawn][:, None], rate[drawn][:, None], rate[labels])
    reference = RefTopK(ids.expand(n, -1), ref[ids].expand(n, -1), tail.expand(n), 1.0, draws)
    found = top_k_kl(
        log_odds(leaf, labels, reference.tokens) + logp[:, None],
        logp,
        labels,
        reference=reference,
        ref_logp=ref[labels],
    )
    (own,) = torch.autograd.grad(found.kl.sum(), leaf, retain_graph=True)
    (sampled,) = torch.autograd.grad((found.remainder * found.logp).sum(), leaf)
    square = (VOCABULARY, VOCABULARY)
    return (
        found.kl.detach().view(square), found.remainder.view(square)[:, 0],
        own.view(*square, -1), sampled.view(*square, -1)[:, 0],
    )  # fmt: skip


@pytest.mark.parametrize("count", DRAWS)
@pytest.mark.parametrize("chance", RATES.values(), ids=RATES)
@pytest.mark.parametrize("sampler", [False, True], ids=["on-policy", "other data"])
def test_unbiased_for_every_distribution_of_the_draws(chance: Tensor, count: int, sampler: bool) -> None:
    logits, ref_logits, behaviour = distributions()
    kl, remainder, own, sampled = estimates(logits, ref_logits, chance, count)
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
