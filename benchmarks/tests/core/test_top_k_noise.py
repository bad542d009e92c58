"""The token noise of `benchmarks.top_k`: its formula against enumeration, against autograd, and against the library."""

import math

import pytest
import torch

from benchmarks.top_k.noise import library_difference, measured, tail_chances, token_noise, top_coefficients
from kl_plugins import KLSpec, RefTopK, exact_kl, kl_term, reference_top_k
from kl_plugins.kernels.exact.reference import RefDraws

VOCABULARY = 7
KS = (1, 3, 6)


def problem(seed, scale=1.5, vocabulary=VOCABULARY):
    generator = torch.Generator().manual_seed(seed)
    ref = torch.randn(1, vocabulary, generator=generator, dtype=torch.float64) * scale
    return ref + torch.randn(ref.shape, generator=generator, dtype=torch.float64), ref


def variance(p, gradients):
    """Trace of the covariance and the mean of gradients (V, V), one row per token that could be drawn."""
    mean = p @ gradients
    return float(p @ (gradients - mean).square().sum(-1)), mean


def enumerated(p, coefficient):
    """The gradient of each token by its definition: c_a (e_a - p)."""
    return torch.stack([coefficient[a] * (torch.eye(len(p), dtype=p.dtype)[a] - p) for a in range(len(p))])


def differentiated(spec, logits, ref, k=None):
    """The gradient of the library's loss for each token that could be drawn, by autograd; V sequences of one token."""
    count = logits.shape[-1]
    copies = logits.repeat(count, 1)[:, None].requires_grad_()
    labels, ref_logp = torch.arange(count)[:, None], ref.log_softmax(-1).T
    more = {}
    if k is None:
        logp = copies.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    else:
        kept = reference_top_k(ref.repeat(count, 1)[:, None], k)
        found = exact_kl(copies, None, labels, reference=kept, ref_logp=ref_logp)
        logp, more = found.logp, {"exact": found.kl, "remainder": found.remainder}
    mask = torch.ones_like(labels, dtype=torch.bool)
    kl_term(KLSpec.parse(spec), logp, ref_logp, mask, **more).loss.sum().backward()
    return copies.grad[:, 0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", [0.1, 1.5, 8.0])
def test_formula_is_the_variance_by_enumeration(seed, scale):
    p = problem(seed, scale)[0].softmax(-1)
    coefficient = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=p.dtype)
    expected, _ = variance(p[0], enumerated(p[0], coefficient[0]))
    assert float(token_noise(p, coefficient)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_noise_of_k2_is_that_of_the_librarys_gradient(seed):
    logits, ref = problem(seed)
    found = measured(logits, ref, KS)
    noise, mean = variance(logits.softmax(-1)[0], differentiated("k2@loss", logits, ref))
    assert float(found.sampled) == pytest.approx(noise, rel=1e-9)
    assert float(found.gradient) == pytest.approx(float(mean.square().sum()), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", KS)
def test_noise_of_top_k_is_that_of_the_librarys_gradient(seed, k):
    logits, ref = problem(seed)
    found = measured(logits, ref, KS)
    noise, mean = variance(logits.softmax(-1)[0], differentiated(f"exact@loss/top:{k}", logits, ref, k))
    assert float(found.bucket[0, KS.index(k)]) == pytest.approx(noise, rel=1e-9, abs=1e-18)
    assert float(found.gradient) == pytest.approx(float(mean.square().sum()), rel=1e-9)  # all have the KL's gradient


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("vocabulary", [VOCABULARY, 33])
def test_noise_with_a_draw_is_that_of_the_librarys_gradient(seed, k, vocabulary):
    """Every label with every draw, and with one that finds nothing; the larger vocabulary has groups."""
    logits, ref = problem(seed, vocabulary=vocabulary)
    p, ref_logp, kept = logits.softmax(-1)[0], ref.log_softmax(-1)[0], reference_top_k(ref, k)
    chance = tail_chances(ref, kept.ids)[0]
    labels, drawn = (part.flatten() for part in torch.meshgrid(*(torch.arange(vocabulary),) * 2, indexing="ij"))
    labels, drawn = torch.cat([labels, torch.arange(vocabulary)]), torch.cat([drawn, torch.zeros(vocabulary).long()])
    nothing = torch.arange(len(labels)) >= vocabulary**2
    rate = chance.log().clamp_min(-1e4)
    draws = RefDraws(drawn, ref_logp[drawn], rate[drawn].masked_fill(nothing, 1e4), rate[labels])
    draws = RefDraws(*(part[:, None] for part in draws[:3]), draws.label_log_rate)
    rows = [part.expand(len(labels), *part.shape[1:]) for part in kept[:3]]
    leaf = logits.repeat(len(labels), 1).requires_grad_()
    found = exact_kl(leaf, None, labels, reference=RefTopK(*rows, 1.0, draws), ref_logp=ref_logp[labels])
    (gradients,) = torch.autograd.grad((found.kl + found.remainder * found.logp).sum(), leaf)
    weight = p[labels] * torch.where(nothing, 1 - chance.sum(), chance[drawn])
    mean = weight @ gradients
    noise = float(weight @ (gradients - mean).square().sum(-1))
    measured_ = measured(logits, ref, (k,), ((k, 1),))
    assert float(measured_.drawn) == pytest.approx(noise, rel=1e-9, abs=1e-18)
    assert float(measured_.gradient) == pytest.approx(float(mean.square().sum()), rel=1e-9)


@pytest.mark.parametrize("k", KS)
def test_noise_without_the_bucket_is_that_of_an_unbiased_estimate(k):
    logits, ref = problem(1)
    found, p = measured(logits, ref, KS), logits.softmax(-1)[0]
    logp, ref_logp = logits.log_softmax(-1), ref.log_softmax(-1)
    ids = ref.topk(k).indices
    u = (logp - ref_logp)[0]
    inside = torch.zeros(VOCABULARY, dtype=torch.bool)
    inside[ids[0]] = True
    of_the_set = (torch.where(inside, p * u, 0.0))[:, None] * (torch.eye(VOCABULARY, dtype=p.dtype) - p)
    gradients = of_the_set.sum(0) + enumerated(p, torch.where(inside, 0.0, u))
    noise, mean = variance(p, gradients)
    assert float(found.plain[0, KS.index(k)]) == pytest.approx(noise, rel=1e-9)
    torch.testing.assert_close(mean, p * (u - found.kl), atol=1e-12, rtol=0)


def test_kl_is_the_librarys():
    logits, ref = problem(2)
    expected = exact_kl(logits, ref, torch.zeros(1, dtype=torch.long)).kl
    assert float(measured(logits, ref, KS).kl) == pytest.approx(float(expected), rel=1e-9)


def test_a_set_of_the_whole_vocabulary_has_no_noise():
    logits, ref = problem(3)
    found = measured(logits, ref, (VOCABULARY, 4 * VOCABULARY))
    assert found.bucket.tolist() == found.plain.tolist() == [[0.0, 0.0]]
    assert float(found.sampled) > 0


def test_a_tail_of_one_token_has_noise_only_without_the_bucket():
    logits, ref = problem(4)
    found = measured(logits, ref, (VOCABULARY - 1,))
    assert float(found.bucket) < 1e-25
    assert float(found.plain) > 1e-6


def test_a_tail_that_is_nearly_empty_keeps_its_digits():
    logits, ref = problem(5, vocabulary=4)
    logits[0, :2], ref[0, :2] = 90.0, 91.0  # the tail has 1e-39 of the probability
    bucket, _ = top_coefficients(logits.log_softmax(-1), ref.log_softmax(-1), torch.tensor([[0, 1]]))
    rest = slice(2, None)
    expected = logits[0, rest].log_softmax(-1) - ref[0, rest].log_softmax(-1)
    torch.testing.assert_close(bucket[0, rest], expected, atol=1e-12, rtol=0)
    assert math.isfinite(float(measured(logits, ref, (2,)).bucket))


def test_coefficients_are_the_librarys_remainders():
    generator = torch.Generator().manual_seed(0)
    ref = torch.randn(40, 300, generator=generator) * 2
    logits = ref + torch.randn(ref.shape, generator=generator) * 0.3
    labels = torch.randint(300, (40,), generator=generator)
    assert library_difference(logits, ref, labels, (4, 64, 300)) < 1e-9
