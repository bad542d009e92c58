"""The KL of a set and a bucket plus its sampled remainder: unbiased for every set, exact for the whole vocabulary."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from kl_plugins.kernels.exact.bucket import RefTopK, bucket_rows, reference_rows
from kl_plugins.kernels.exact.statistics import Options

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
    logp = ref_logits.log_softmax(-1)
    ids = torch.tensor(chosen)
    rest = torch.ones(VOCABULARY, dtype=torch.bool).index_fill(0, ids, False)
    return RefTopK(ids[None], logp[ids][None], torch.logsumexp(logp.masked_fill(~rest, -torch.inf), -1)[None])


def each_token(logits: Tensor, ref_logits: Tensor, chosen: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """kl, remainder and the gradients (V, V) of both together, one row per drawn token."""
    reference = reference_of(ref_logits, chosen)
    leaf = logits.repeat(VOCABULARY, 1).requires_grad_()
    labels = torch.arange(VOCABULARY)
    wide = [part.expand(VOCABULARY, *part.shape[1:]) for part in reference[:3]]
    kl, remainder, logp, *_ = bucket_rows(leaf, labels, ref_logits.log_softmax(-1), *wide, Options(backend="eager"))
    (own,) = torch.autograd.grad(kl.sum(), leaf, retain_graph=True)
    (sampled,) = torch.autograd.grad((remainder * logp).sum(), leaf)
    return kl.detach(), torch.stack([remainder, own.new_zeros(VOCABULARY)])[0], torch.stack([own, sampled])


@pytest.mark.parametrize("chosen", SETS)
def test_unbiased_for_every_set(chosen: tuple[int, ...]) -> None:
    logits, ref_logits, sampler = distributions()
    kl, remainder, (own, sampled) = each_token(logits, ref_logits, chosen)
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
    _, _, (own, sampled) = each_token(logits, ref_logits, (0,))
    p, u = logits.softmax(-1), logits.log_softmax(-1) - ref_logits.log_softmax(-1)
    gradient = p * (u - (p * u).sum())
    assert (own[0] + (sampler[:, None] * sampled).sum(0) - gradient).norm() > 0.05 * gradient.norm()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_are_those_of_the_values(temperature: float, softcap: float | None) -> None:
    torch.manual_seed(0)
    logits, ref_logits = (torch.randn(3, 7).double() for _ in range(2))
    options = Options(1 / temperature, softcap, softcap, "eager")
    reference = reference_rows(ref_logits, 3, options)
    labels = torch.tensor([0, 3, -100])

    def value(leaf: Tensor) -> tuple[Tensor, Tensor]:
        kl, _, logp, *_ = bucket_rows(leaf, labels, torch.zeros(3).double(), *reference[:3], options)
        return kl, logp

    assert torch.autograd.gradcheck(value, logits.requires_grad_())


def test_the_references_top_tokens_and_their_tail() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 11)
    for k in (1, 4, 11, 20):
        found = reference_rows(logits, k, Options())
        logp = logits.log_softmax(-1)
        torch.testing.assert_close(found.logp, logp.gather(-1, found.ids))
        torch.testing.assert_close(found.logp.exp().sum(-1) + found.log_tail.exp(), torch.ones(4))
        assert found.ids.shape[-1] == min(k, 11)
        assert (found.log_tail == -torch.inf).all() == (k >= 11)


def test_empty_and_tiny_tails_stay_finite() -> None:
    logits = torch.tensor(
        [[100.0, 0.0, -100.0, 0.0], [0.0, -torch.inf, -torch.inf, -torch.inf], [0.0, 0.0, 50.0, 50.0]]
    )
    ref_logits = torch.tensor([[0.0, 100.0, 0.0, 0.0], [0.0, 0.0, -torch.inf, -torch.inf], [90.0, 0.0, 0.0, 0.0]])
    reference = reference_rows(ref_logits, 1, Options())
    leaf = logits.requires_grad_()
    labels = torch.tensor([0, 0, 2])
    kl, remainder, logp, *_ = bucket_rows(leaf, labels, ref_logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0],
                                          *reference[:3], Options())  # fmt: skip
    (gradient,) = torch.autograd.grad((kl + remainder * logp).sum(), leaf)
    for part in (kl, remainder, logp, gradient):
        assert part.isfinite().all(), part
    assert (kl >= 0).all()


def test_a_small_divergence_keeps_its_digits() -> None:
    torch.manual_seed(0)
    ref_logits = 4 * torch.randn(8, 5000)
    logits = ref_logits + 0.005 * torch.randn(8, 5000)
    reference = reference_rows(ref_logits, 64, Options())
    labels = logits.argmax(-1)
    kl, *_ = bucket_rows(logits, labels, torch.zeros(8), *reference[:3], Options())
    log_p, log_r = logits.double().log_softmax(-1), ref_logits.double().log_softmax(-1)
    outside = torch.ones(8, 5000, dtype=torch.bool).scatter(-1, reference.ids, False)
    tails = [torch.logsumexp(x.masked_fill(~outside, -torch.inf), -1) for x in (log_p, log_r)]
    p, r = log_p.gather(-1, reference.ids), log_r.gather(-1, reference.ids)
    true = (p.exp() * (p - r)).sum(-1) + tails[0].exp() * (tails[0] - tails[1])
    assert true.max() < 1e-4
    assert ((kl.double() - true).norm() / true.norm()) < 1e-3
