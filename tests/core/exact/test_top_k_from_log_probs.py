"""The KL over a set and a bucket from log-probs: equal to that from logits, finite for every input."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kl_plugins import RefTopK, exact_kl, reference_top_k
from kl_plugins.kernels.exact.kept_log_probs import SMALLEST_TAIL
from kl_plugins.top_k import log_odds, reference_of, top_k_kl, top_tokens

ROWS, VOCABULARY, K = 40, 300, 16
UPSTREAM = torch.linspace(-1.0, 1.0, ROWS)


def drawn(dtype: torch.dtype, sharpness: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of policy and reference, and labels that the policy drew."""
    torch.manual_seed(3)
    logits = (torch.randn(ROWS, VOCABULARY) * sharpness).to(dtype)
    ref_logits = (logits.float() + 0.3 * torch.randn(ROWS, VOCABULARY)).to(dtype)
    return logits, ref_logits, logits.float().softmax(-1).multinomial(1)[:, 0]


def label_logp(logits: Tensor, labels: Tensor) -> Tensor:
    every = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return every.gather(-1, labels[:, None])[:, 0]


def from_log_probs(logits: Tensor, ref_logits: Tensor, labels: Tensor, k: int = K, **given: Any) -> tuple[Any, Tensor]:
    ref_logp = label_logp(ref_logits, labels)
    ids = top_tokens(ref_logits, k)
    kept = log_odds(ref_logits, labels, ids) + ref_logp[:, None]
    leaf = logits.clone().requires_grad_()
    logp = label_logp(leaf, labels)
    found = top_k_kl(
        log_odds(leaf, labels, ids) + logp[:, None],
        logp,
        labels,
        reference=reference_of(ids, kept, ref_logits.shape[-1]),
        ref_logp=ref_logp,
        **given,
    )
    (found.kl * UPSTREAM.to(found.kl)).sum().backward()
    assert leaf.grad is not None
    return found, leaf.grad


def from_logits(logits: Tensor, ref_logits: Tensor, labels: Tensor, k: int = K) -> tuple[Any, Tensor]:
    leaf = logits.clone().requires_grad_()
    reference, ref_logp = reference_top_k(ref_logits, k), label_logp(ref_logits, labels)
    found = exact_kl(leaf, None, labels, reference=reference, ref_logp=ref_logp)
    (found.kl * UPSTREAM.to(found.kl)).sum().backward()
    assert leaf.grad is not None
    return found, leaf.grad


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)]
)
@pytest.mark.parametrize("sharpness", [1.0, 4.0])
def test_equal_to_the_form_that_takes_logits(dtype: torch.dtype, limit: float, sharpness: float) -> None:
    given = drawn(dtype, sharpness)
    (ours, gradient), (theirs, expected) = from_log_probs(*given), from_logits(*given)
    assert 0 < (theirs.remainder != 0).sum() < ROWS
    precise = min(limit, 1e-5)  # 16 bits round the gradient alone
    for name in ("kl", "logp", "remainder"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=precise, atol=precise)
    assert gradient.dtype == dtype
    assert (gradient.double() - expected.double()).abs().max() < limit


def test_the_whole_vocabulary_has_no_bucket() -> None:
    logits, ref_logits, labels = drawn(torch.float32, 1.0)
    found, _ = from_log_probs(logits, ref_logits, labels, VOCABULARY + 1)
    p, u = logits.softmax(-1), logits.log_softmax(-1) - ref_logits.log_softmax(-1)
    torch.testing.assert_close(found.kl, (p * u).sum(-1), rtol=1e-4, atol=1e-6)
    assert not found.remainder.any()


def test_equal_policies_have_no_kl_and_no_gradient() -> None:
    logits, _, labels = drawn(torch.float32, 4.0)
    found, gradient = from_log_probs(logits, logits, labels)
    assert found.kl.abs().max() < 1e-9
    assert gradient.abs().max() < 1e-6


def test_a_bucket_that_rounding_empties_changes_nothing() -> None:
    """The set has all the probability that float32 can show, and log-probs that sum to more than 1."""
    ids = torch.tensor([[0, 1]])
    log_probs = torch.tensor([[0.7, 0.3]]).log().add(1e-6).requires_grad_()
    reference = reference_of(ids, torch.tensor([[0.6, 0.4]]).log().add(1e-6), 10)
    assert reference.log_tail.exp().item() == pytest.approx(SMALLEST_TAIL, rel=1e-5)
    logp = torch.tensor([0.7]).log()
    found = top_k_kl(log_probs, logp, torch.tensor([0]), reference=reference, ref_logp=torch.tensor([0.6]).log())
    expected = 0.7 * torch.tensor(0.7 / 0.6).log() + 0.3 * torch.tensor(0.3 / 0.4).log()
    assert found.kl.item() == pytest.approx(expected.item(), abs=1e-5)
    found.kl.backward()
    assert log_probs.grad is not None
    assert log_probs.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e4, 3e4, torch.inf])
def test_finite_for_every_finite_log_prob(dtype: torch.dtype, size: float) -> None:
    """Logits of all sizes, and tokens that are impossible for one of the two; the label is possible for both."""
    torch.manual_seed(0)
    labels = torch.zeros(ROWS, dtype=torch.long)
    sides = []
    for _ in range(2):
        logits = torch.randn(ROWS, VOCABULARY)
        shut = torch.rand(ROWS, VOCABULARY) < 0.5
        sides.append(logits.masked_fill(shut.index_fill(-1, labels[:1], False), -size).to(dtype))
    found, gradient = from_log_probs(*sides, labels)
    assert found.kl.isfinite().all()
    assert (found.kl >= 0).all()
    assert found.remainder.isfinite().all()
    assert gradient.isfinite().all()


def test_positions_that_are_left_out_may_hold_anything() -> None:
    logits, ref_logits, labels = drawn(torch.float32, 1.0)
    keep = torch.arange(ROWS) % 3 > 0
    _, whole = from_log_probs(logits, ref_logits, labels)
    holes = ~keep[:, None]
    for label in (labels, labels.masked_fill(~keep, -100)):
        ids = top_tokens(ref_logits, K)
        kept = log_odds(ref_logits, labels, ids) + label_logp(ref_logits, labels)[:, None]
        reference = reference_of(ids.masked_fill(holes, -7), kept.masked_fill(holes, torch.nan), VOCABULARY)
        leaf = logits.clone().requires_grad_()
        logp = label_logp(leaf, labels)
        log_probs = (log_odds(leaf, labels, ids) + logp[:, None]).masked_fill(holes, torch.nan)
        mask = keep if label is labels else None
        ref_logp = label_logp(ref_logits, labels).masked_fill(~keep, torch.nan)
        found = top_k_kl(log_probs, logp, label, reference=reference, ref_logp=ref_logp, mask=mask)
        assert not found.kl[~keep].any()
        assert not found.remainder[~keep].any()
        (found.kl * UPSTREAM).sum().backward()
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, whole.masked_fill(holes, 0.0))


def test_gradcheck() -> None:
    logits, ref_logits, labels = (part[:4] for part in drawn(torch.float64, 1.0))
    reference, ref_logp = reference_top_k(ref_logits, 3), label_logp(ref_logits, labels)

    def kl(leaf: Tensor) -> Tensor:
        logp = label_logp(leaf, labels)
        log_probs = log_odds(leaf, labels, reference.ids) + logp[:, None]
        return top_k_kl(log_probs, logp, labels, reference=reference, ref_logp=ref_logp).kl

    assert torch.autograd.gradcheck(kl, logits.requires_grad_())


def test_log_odds_of_scaled_and_capped_logits() -> None:
    logits = torch.tensor([[4.0, -2.0, 8.0]])
    found = log_odds(logits, torch.tensor([0]), torch.tensor([[2, 1]]), temperature=2.0, softcap=5.0)
    capped = 5.0 * torch.tanh(logits / 5.0) / 2.0
    torch.testing.assert_close(found, capped[:, [2, 1]] - capped[:, :1])


def squared_log_probs(product: Tensor, labels: Tensor, ids: Tensor, **options: bool) -> Tensor:
    """Compute a sum over the log-probs of some tokens and their labels."""
    odds = log_odds(product, labels, ids, **options)
    return ((odds + label_logp(product, labels)[..., None]) ** 2).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["whole", "view", "part"])
def test_a_shared_gradient_is_that_of_its_own(dtype: torch.dtype, shape: str) -> None:
    logits, ref_logits, labels = drawn(dtype, 1.0)
    ids = top_tokens(ref_logits, K)
    found = []
    for share_grad in (False, True):
        leaf = logits.clone().requires_grad_()
        product = leaf * 1.0
        seen = {"whole": product, "view": product.unsqueeze(0).squeeze(0), "part": product[:-1]}[shape]
        size = len(seen)
        odds = log_odds(seen, labels[:size], ids[:size], share_grad=share_grad)
        own = label_logp(product, labels)[:size, None]  # does not go through the view
        (gradient,) = torch.autograd.grad(((odds + own) ** 2).sum(), leaf)
        found.append(gradient.float())
    assert found[0].norm() > 0
    assert (found[0] - found[1]).norm() < (1e-6 if dtype == torch.float32 else 0.01) * found[0].norm()


def test_a_shared_gradient_needs_another_one() -> None:
    logits, ref_logits, labels = drawn(torch.float32, 1.0)
    ids = top_tokens(ref_logits, K)
    leaf = logits.clone().requires_grad_()
    product = leaf * 1.0
    odds = log_odds(product, labels, ids, share_grad=True).sum()
    with pytest.raises(RuntimeError, match="no other gradient"):
        odds.backward(retain_graph=True)
    # The gradient of a sum is one number in memory, which is copied before something is added to it.
    (product.sum() + odds).backward()
    (expected,) = torch.autograd.grad(product.sum() + log_odds(product, labels, ids).sum(), product)
    torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("times", [1, 2])
def test_a_shared_gradient_is_added_once_in_each_backward_pass(times: int) -> None:
    logits, ref_logits, labels = drawn(torch.float64, 1.0)
    leaf = logits.clone().requires_grad_()
    ids = top_tokens(ref_logits, K)
    loss = squared_log_probs(leaf * 1.0, labels, ids, share_grad=True)
    for _ in range(times):
        loss.backward(retain_graph=True)
    (expected,) = torch.autograd.grad(squared_log_probs(leaf, labels, ids), leaf)
    torch.testing.assert_close(leaf.grad, times * expected)
    with torch.no_grad():
        torch.testing.assert_close(log_odds(leaf, labels, ids, share_grad=True), log_odds(leaf, labels, ids))


def test_arguments_that_do_not_fit() -> None:
    reference = RefTopK(torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2), torch.zeros(3))
    row, labels = torch.zeros(3), torch.zeros(3, dtype=torch.long)
    given: dict[str, Any] = {"reference": reference, "ref_logp": row}
    with pytest.raises(TypeError, match="pass the logits to exact_kl"):
        top_k_kl(torch.zeros(3, 2, dtype=torch.bfloat16), row, labels, **given)
    with pytest.raises(ValueError, match=r"like reference\.tokens"):
        top_k_kl(torch.zeros(3, 4), row, labels, **given)
    with pytest.raises(ValueError, match="one per position"):
        top_k_kl(torch.zeros(3, 2), row, labels[:2], **given)
