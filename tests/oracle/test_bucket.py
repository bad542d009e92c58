"""The KL of a set and a bucket and its sampled remainder in one state: unbiased for every set, exact for all tokens."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from kl_plugins import RefTopK, exact_kl
from kl_plugins.top_k import log_odds, top_k_kl

VOCABULARY = 5
SETS = [s for k in range(1, VOCABULARY + 1) for s in combinations(range(VOCABULARY), k)]


def distributions() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of policy and reference, and probabilities of a sampler, float64."""
    torch.manual_seed(1)
    return (
        torch.randn(VOCABULARY).double(),
        torch.randn(VOCABULARY).double(),
        torch.randn(VOCABULARY).double().softmax(-1),
    )


def reference_of(ref_logits: Tensor, chosen: tuple[int, ...]) -> RefTopK:
    """The same set in one row for each token of the vocabulary."""
    logp, ids = ref_logits.log_softmax(-1), torch.tensor(chosen)
    rest = torch.ones(VOCABULARY, dtype=torch.bool).index_fill(0, ids, False)
    tail = torch.logsumexp(logp.masked_fill(~rest, -torch.inf), -1)
    return RefTopK(ids.expand(VOCABULARY, -1), logp[ids].expand(VOCABULARY, -1), tail.expand(VOCABULARY))


FORMS = ("logits", "log-probs")
"""The same function twice: from all logits, and from log-probs of the set and of the drawn token."""


def each_token(logits: Tensor, ref_logits: Tensor, chosen: tuple[int, ...], form: str) -> tuple[Tensor, Tensor, Tensor]:
    """kl, remainder and the gradients (2, V, V) of sum and bucket and of the remainder, one row per drawn token."""
    leaf = logits.repeat(VOCABULARY, 1).requires_grad_()
    labels = torch.arange(VOCABULARY)
    reference = reference_of(ref_logits, chosen)
    given: dict[str, Any] = {"reference": reference, "ref_logp": ref_logits.log_softmax(-1)}
    if form == "logits":
        found = exact_kl(leaf, None, labels, **given)
    else:
        logp = leaf.log_softmax(-1).diagonal()
        found = top_k_kl(log_odds(leaf, labels, reference.ids) + logp[:, None], logp, labels, **given)
    (own,) = torch.autograd.grad(found.kl.sum(), leaf, retain_graph=True)
    (sampled,) = torch.autograd.grad((found.remainder * found.logp).sum(), leaf)
    return found.kl.detach(), found.remainder, torch.stack([own, sampled])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chosen", SETS)
def test_unbiased_for_every_set(chosen: tuple[int, ...], form: str) -> None:
    logits, ref_logits, sampler = distributions()
    kl, remainder, (own, sampled) = each_token(logits, ref_logits, chosen, form)
    p, u = logits.softmax(-1), logits.log_softmax(-1) - ref_logits.log_softmax(-1)
    exact = (p * u).sum()
    gradient = p * (u - exact)
    assert torch.allclose(kl + (p * remainder).sum(), exact.expand_as(kl), atol=1e-14)
    assert torch.allclose(own[0] + (p[:, None] * sampled).sum(0), gradient, atol=1e-14)
    # Drawn by another policy, the remainder takes the weight of its token; sum and bucket take none.
    weight = p / sampler
    assert torch.allclose(own[0] + (sampler[:, None] * weight[:, None] * sampled).sum(0), gradient, atol=1e-14)
    assert (kl >= 0).all()
    assert (kl <= exact + 1e-14).all()
    if len(chosen) == VOCABULARY:
        assert not remainder.any()
        assert torch.allclose(kl, exact.expand_as(kl), atol=1e-14)


def test_without_its_weight_the_remainder_is_biased_on_other_data() -> None:
    """The control: the equality above can fail."""
    logits, ref_logits, sampler = distributions()
    _, _, (own, sampled) = each_token(logits, ref_logits, (0,), FORMS[0])
    p, u = logits.softmax(-1), logits.log_softmax(-1) - ref_logits.log_softmax(-1)
    gradient = p * (u - (p * u).sum())
    assert (own[0] + (sampler[:, None] * sampled).sum(0) - gradient).norm() > 0.05 * gradient.norm()
