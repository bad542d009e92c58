"""Rows that must not count, logits that are not finite, and numbers at the end of their range."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kl_plugins import exact_kl, linear_kl
from tests.core.exact.support import make_rows, norm_error, textbook

INF = math.inf


def live(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_ignored_rows_may_hold_anything(dtype: torch.dtype) -> None:
    rows = make_rows(6, 50, dtype=dtype)
    for bad in (math.nan, INF, -INF, torch.finfo(dtype).max):
        for by_mask in (True, False):
            logits, ref_logits, labels = (x.clone() for x in rows)
            logits[[1, 4]], ref_logits[[1, 2]] = bad, bad
            mask = torch.tensor([True, False, False, True, False, True])
            if not by_mask:
                labels = labels.masked_fill(~mask, -100)
            leaf = live(logits)
            found = exact_kl(leaf, ref_logits, labels, mask=mask if by_mask else None)
            upstream = torch.where(mask, 1.0, math.nan).to(found.kl.dtype)
            torch.autograd.backward((found.kl, found.logp), (upstream, upstream))
            clean = exact_kl(*rows)
            for part, wanted in zip(found, clean, strict=True):
                assert torch.equal(part, torch.where(mask, wanted, 0.0))
            assert leaf.grad is not None
            assert torch.equal(leaf.grad[~mask], torch.zeros(3, 50, dtype=dtype))
            assert leaf.grad[mask].abs().amax(-1).min() > 0


def test_ignored_positions_of_hidden_states() -> None:
    torch.manual_seed(0)
    hidden, ref_hidden = torch.randn(2, 4, 8), torch.randn(2, 4, 6)
    weight, ref_weight = torch.randn(50, 8), torch.randn(50, 6)
    labels, mask = torch.randint(0, 50, (2, 4)), torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1]])
    wanted = linear_kl(hidden, weight, ref_hidden, ref_weight, labels)
    spoilt = hidden.masked_fill(mask[..., None] == 0, math.nan)
    for weights in ({}, {"kl_weight": mask / mask.bool(), "logp_weight": mask / mask.bool()}):  # 0 / 0 is NaN
        leaf, head = live(spoilt), live(weight)
        found = linear_kl(leaf, head, ref_hidden, ref_weight, labels, mask=mask, **weights)
        loss = found.loss if weights else (found.kl + found.logp).sum()
        assert loss.isfinite()
        loss.backward()
        torch.testing.assert_close(found.kl, wanted.kl * mask)
        torch.testing.assert_close(found.ref_logp, wanted.ref_logp * mask)
        assert leaf.grad is not None
        assert head.grad is not None
        assert torch.equal(leaf.grad[mask == 0], torch.zeros(3, 8))
        assert head.grad.isfinite().all()
        counted, other = mask == 1, live(weight)
        flat = linear_kl(hidden[counted], other, ref_hidden[counted], ref_weight, labels[counted])
        (flat.kl + flat.logp).sum().backward()
        torch.testing.assert_close(head.grad, other.grad)
    nothing = linear_kl(live(spoilt), weight, ref_hidden, ref_weight, labels, mask=mask * 0)
    nothing.kl.sum().backward()
    assert torch.equal(nothing.kl, torch.zeros(2, 4))


@pytest.mark.parametrize("differentiable_logp", [True, False])
def test_upstream_gradients_of_ignored_positions_may_be_anything(differentiable_logp: bool) -> None:
    torch.manual_seed(0)
    leaf, heads = live(torch.randn(4, 8)), (torch.randn(50, 8), torch.randn(4, 8), torch.randn(50, 8))
    labels = torch.tensor([3, -100, 5, -100])
    found = linear_kl(leaf, *heads, labels, differentiable_logp=differentiable_logp)
    found.kl.backward(torch.tensor([1.0, math.nan, 1.0, INF]))
    assert leaf.grad is not None
    assert torch.equal(leaf.grad[labels < 0], torch.zeros(2, 8))
    assert leaf.grad[labels >= 0].abs().amax(-1).min() > 0


def excluded(tensor: Tensor, *columns: int) -> Tensor:
    return tensor.index_fill(-1, torch.tensor(columns), -INF)


def test_tokens_that_the_policy_excludes() -> None:
    """They leave the sum, but their mass under the reference still normalises it."""
    rows = make_rows(16, 50, distance=0.3)
    labels = torch.full((16,), 7)
    for ref_logits in (rows.ref_logits, excluded(rows.ref_logits, 0, 1, 2)):
        leaf, exact = live(excluded(rows.logits, 0, 1, 2)), live(excluded(rows.logits, 0, 1, 2).double())
        found, wanted = exact_kl(leaf, ref_logits, labels), textbook(exact, ref_logits, labels)
        assert norm_error(found.kl.detach(), wanted.kl.detach()) < 1e-5
        found.kl.sum().backward()
        wanted.kl.sum().backward()
        assert leaf.grad is not None
        assert exact.grad is not None
        assert norm_error(leaf.grad[:, 3:], exact.grad[:, 3:]) < 1e-5
        assert torch.equal(leaf.grad[:, :3], torch.zeros(16, 3))


def test_the_reference_alone_excludes_tokens() -> None:
    """The divergence is infinite: it saturates at 1e4 nats times the mass there, and pulls that mass down."""
    rows = make_rows(16, 50, distance=0.3, std=1.0)
    leaf = live(rows.logits)
    found = exact_kl(leaf, excluded(rows.ref_logits, 3), torch.full((16,), 3))
    found.kl.sum().backward()
    mass = torch.softmax(rows.logits.double(), -1)[:, 3]
    torch.testing.assert_close(found.kl.detach().double(), mass * 1e4, rtol=0.05, atol=0)
    assert torch.equal(found.ref_logp, torch.full((16,), -1e4))
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[:, 3] > 0).all()


def test_a_label_that_the_policy_excludes() -> None:
    rows = make_rows(16, 50, distance=0.3)
    found = exact_kl(excluded(rows.logits, 3), rows.ref_logits, torch.full((16,), 3))
    wanted = textbook(excluded(rows.logits, 3), rows.ref_logits, torch.full((16,), 3))
    assert norm_error(found.kl, wanted.kl) < 1e-5
    assert torch.equal(found.logp, torch.full((16,), -1e4))


def test_a_reference_without_any_token() -> None:
    found = exact_kl(torch.zeros(1, 4), torch.full((1, 4), -INF), torch.zeros(1, dtype=torch.int64))
    assert found.kl.item() == 1e4
    assert found.ref_logp.item() == -1e4


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_nonsense_in_a_row_that_counts_stays_visible(bad: float) -> None:
    rows = make_rows(4, 50)
    logits = rows.logits.clone()
    logits[2, 5] = bad
    found = exact_kl(logits, rows.ref_logits, rows.labels)
    assert found.kl.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.1}, {"softcap": 30.0, "ref_softcap": 30.0}], ids=str)
def test_finite_logits_never_give_anything_else(dtype: torch.dtype, options: dict[str, float]) -> None:
    # Nothing is wider than float64, so what it cannot hold divided by the temperature is no number to begin with.
    largest = torch.finfo(dtype).max / (16 if dtype == torch.float64 else 1)
    ends = torch.tensor([largest, -largest, largest / 2, 1e4, -1e4, 100.0, -100.0, 1.0, 0.0, -1e-7], dtype=dtype)
    torch.manual_seed(0)
    leaf = live(ends[torch.randint(0, len(ends), (300, 6))])
    found = exact_kl(leaf, ends[torch.randint(0, len(ends), (300, 6))], torch.randint(0, 6, (300,)), **options)
    (found.kl + found.logp).sum().backward()
    assert leaf.grad is not None
    for tensor in (*found, leaf.grad):
        assert tensor.isfinite().all()
    # p (z - u - centre) and 1 - p: probabilities beyond 1 would show here, not in what saturates.
    assert float(leaf.grad.abs().max()) <= 2.1e4 / options.get("temperature", 1.0)
    assert float(found.kl.detach().min()) >= 0
    assert float(found.logp.detach().max()) <= 0


@pytest.mark.parametrize("fill", [torch.finfo(torch.float32).min, -1e9, -1e4])
def test_finite_stand_ins_for_minus_infinity(fill: float) -> None:
    rows = make_rows(16, 50, distance=0.3)
    hidden = [x.index_fill(-1, torch.tensor([1, 2]), fill) for x in rows[:2]]
    labels = torch.full((16,), 7)
    wanted = textbook(*(excluded(x, 1, 2) for x in rows[:2]), labels)
    assert norm_error(exact_kl(*hidden, labels).kl, wanted.kl) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_that_the_dtype_cannot_hold_saturate(dtype: torch.dtype) -> None:
    rows = make_rows(4, 50, distance=5.0, dtype=dtype)
    leaf = live(rows.logits)
    exact_kl(leaf, rows.ref_logits, rows.labels).kl.backward(torch.full((4,), 3e38))
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert float(leaf.grad.abs().max()) == torch.finfo(dtype).max
