"""Large results on a CPU lie in mapped memory, and nobody can tell but by the time it takes."""

from __future__ import annotations

import gc
import pickle
from pathlib import Path

import pytest
import torch

from kl_plugins import exact_kl, linear_kl
from kl_plugins.kernels import memory

COLUMNS = 1024
ROWS = memory.LARGE // (4 * COLUMNS)

pytestmark = pytest.mark.skipif(not memory._huge_pages(), reason="this system knows no advice on huge pages")


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_shape_dtype_and_zeros(dtype: torch.dtype) -> None:
    like = torch.randn(2 * ROWS, COLUMNS)
    for made in (memory.empty_like(like, dtype), memory.zeros_like(like, dtype)):
        assert made.shape == like.shape
        assert made.dtype == dtype
        assert made.is_contiguous()
        assert not made.requires_grad
    assert not memory.zeros_like(like, dtype).any()


def test_what_does_not_suit_is_allocated_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise AssertionError("mapped")

    monkeypatch.setattr(memory, "_mapped", refuse)
    large = torch.randn(ROWS, COLUMNS)
    with pytest.raises(AssertionError, match="mapped"):
        memory.empty_like(large)
    transposed = memory.zeros_like(large.t())
    assert transposed.stride() == large.t().stride()
    assert memory.empty_like(large[:10]).shape == (10, COLUMNS)
    assert memory.empty_like(torch.empty(ROWS, COLUMNS, device="meta")).device.type == "meta"


def test_memory_lives_as_long_as_a_view_and_is_given_back() -> None:
    made = memory.zeros_like(torch.empty(8 * ROWS, COLUMNS))
    made += 1.0
    held = resident()
    view = made[1:3]
    del made
    gc.collect()
    torch.testing.assert_close(view, torch.ones(2, COLUMNS))
    assert resident() > held - memory.LARGE
    del view
    gc.collect()
    assert resident() < held - 6 * memory.LARGE


def test_a_gradient_in_mapped_memory_is_a_gradient_like_any_other() -> None:
    torch.manual_seed(0)
    logits = torch.randn(ROWS, COLUMNS, requires_grad=True)
    ref_logits, labels = torch.randn(ROWS, COLUMNS), torch.randint(COLUMNS, (ROWS,))
    for _ in range(2):  # the second is added to the first in place
        exact_kl(logits, ref_logits, labels).kl.sum().backward()
    assert logits.grad is not None
    part = logits.detach()[:4].clone().requires_grad_()
    exact_kl(part, ref_logits[:4], labels[:4]).kl.sum().backward()
    assert part.grad is not None
    torch.testing.assert_close(logits.grad[:4], 2 * part.grad)
    torch.testing.assert_close(pickle.loads(pickle.dumps(logits.grad)), logits.grad)
    torch.optim.SGD([logits], lr=0.1).step()


def test_a_loss_whose_graph_is_kept_gives_the_same_gradient_again() -> None:
    torch.manual_seed(0)
    hidden, ref_hidden = torch.randn(8, 64, requires_grad=True), torch.randn(8, 64)
    weight = torch.randn(memory.LARGE // 256, 64, requires_grad=True)
    labels = torch.randint(len(weight), (8,))
    loss = linear_kl(hidden, weight, ref_hidden, weight.detach().clone(), labels, kl_weight=torch.rand(8)).loss
    first, second = (torch.autograd.grad(3.0 * loss, (hidden, weight), retain_graph=keep) for keep in (True, False))
    for one, other in zip(first, second, strict=True):
        assert one.norm() > 0
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    # The last pass scales in place what nobody can ask for again; its result must still be the caller's alone.
    assert first[1].data_ptr() != second[1].data_ptr()


@pytest.mark.parametrize("left_out", [4, 1], ids=["all left out", "one left out"])
def test_nothing_is_read_from_memory_that_nobody_wrote(left_out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "empty_like", lambda like, dtype=None: torch.full_like(like, torch.nan, dtype=dtype))
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 64, requires_grad=True), torch.randn(300, 64, requires_grad=True)
    labels = torch.randint(300, (4,))
    labels[:left_out] = -100
    sides = (hidden, weight, torch.randn(4, 64), torch.randn(300, 64))
    linear_kl(*sides, labels, kl_weight=torch.rand(4), max_tile_bytes=1).loss.backward()
    for gradient in (hidden.grad, weight.grad):
        assert gradient is not None
        assert gradient.isfinite().all()
        assert bool(gradient.any()) is (left_out < 4)
