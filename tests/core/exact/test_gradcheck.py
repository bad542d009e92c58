"""Numerical gradients in float64: both functions, both modes, every option."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kl_plugins import exact_kl, linear_kl

OPTIONS = [
    {},
    {"temperature": 0.7},
    {"softcap": 3.0, "ref_softcap": 3.0},
    {"softcap": 2.0, "temperature": 1.3},
]
TILES = 600  # bytes: two or three rows at a time


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


LABELS = torch.tensor([3, 0, -100, 6, 5])
REF_LOGITS, HIDDEN, WEIGHT, BIAS = numbers(5, 7), numbers(5, 3, seed=1), numbers(7, 3, seed=2), numbers(7, seed=3)
REFERENCE = (numbers(5, 4, seed=4), numbers(7, 4, seed=5))


def live(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.clone().requires_grad_() for tensor in tensors)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits(options: dict[str, float]) -> None:
    def call(logits: Tensor) -> tuple[Tensor, ...]:
        return exact_kl(logits, REF_LOGITS, LABELS, max_tile_bytes=TILES, **options)[:2]

    assert torch.autograd.gradcheck(call, live(numbers(5, 7, seed=6)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_linear_with_any_upstream_gradient(options: dict[str, float]) -> None:
    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return linear_kl(hidden, weight, *REFERENCE, LABELS, bias=bias, max_tile_bytes=TILES, **options)[:2]

    assert torch.autograd.gradcheck(call, live(HIDDEN, WEIGHT, BIAS))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_linear_as_a_loss(options: dict[str, float]) -> None:
    weights = {"kl_weight": numbers(5, seed=7), "logp_weight": numbers(5, seed=8)}

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # Twice: the gradient is known before the upstream one.
        return (
            2 * linear_kl(hidden, weight, *REFERENCE, LABELS, bias=bias, max_tile_bytes=TILES, **weights, **options)[0]
        )

    assert torch.autograd.gradcheck(call, live(HIDDEN, WEIGHT, BIAS))


@pytest.mark.parametrize("differentiable_logp", [True, False])
def test_a_frozen_head(differentiable_logp: bool) -> None:
    def call(hidden: Tensor) -> tuple[Tensor, ...]:
        found = linear_kl(
            hidden,
            WEIGHT,
            *REFERENCE,
            LABELS,
            bias=BIAS,
            differentiable_logp=differentiable_logp,
            max_tile_bytes=TILES,
        )
        assert found.logp.requires_grad is differentiable_logp
        return found[: 1 + differentiable_logp]

    assert torch.autograd.gradcheck(call, live(HIDDEN))


def test_transforms() -> None:
    logits = numbers(3, 5, 7, seed=9)
    refs = REF_LOGITS.expand(3, 5, 7)

    def loss(logits: Tensor, ref_logits: Tensor) -> Tensor:
        found = exact_kl(logits, ref_logits, LABELS)
        return (found.kl + 0.5 * found.logp).sum()

    expected = torch.stack([torch.func.grad(loss)(one, REF_LOGITS) for one in logits])
    (leaf,) = live(logits)
    loss_all = exact_kl(leaf, refs, LABELS.expand(3, 5))
    (loss_all.kl + 0.5 * loss_all.logp).sum().backward()
    torch.testing.assert_close(expected, leaf.grad, rtol=0, atol=0)
    for dims in ((0, None), (0, 0)):
        given = REF_LOGITS if dims[1] is None else refs
        torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss), dims)(logits, given), expected)
    by_hidden = torch.func.grad(lambda hidden: linear_kl(hidden, WEIGHT, *REFERENCE, LABELS).kl.sum())(HIDDEN)
    (hidden,) = live(HIDDEN)
    linear_kl(hidden, WEIGHT, *REFERENCE, LABELS).kl.sum().backward()
    torch.testing.assert_close(by_hidden, hidden.grad)


def test_second_derivatives_are_refused() -> None:
    (logits,) = live(numbers(5, 7))
    (grad,) = torch.autograd.grad(exact_kl(logits, REF_LOGITS, LABELS).kl.sum(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        grad.sum().backward()
    (hidden,) = live(HIDDEN)
    kl = linear_kl(hidden, WEIGHT, *REFERENCE, LABELS).kl.sum()
    (grad,) = torch.autograd.grad(kl, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        grad.sum().backward()

    def slope(logits: Tensor) -> Tensor:
        return torch.func.grad(lambda z: exact_kl(z, REF_LOGITS, LABELS).kl.sum())(logits).sum()

    with pytest.raises(NotImplementedError, match="no second derivatives"):
        torch.func.grad(slope)(REF_LOGITS + 1)


def test_the_reference_gets_no_gradient() -> None:
    logits, ref_logits = live(numbers(5, 7), REF_LOGITS)
    found = exact_kl(logits, ref_logits, LABELS)
    assert not found.ref_logp.requires_grad
    found.kl.sum().backward()
    assert ref_logits.grad is None
    hidden, ref_hidden, ref_weight = live(HIDDEN, *REFERENCE)
    linear_kl(hidden, WEIGHT, ref_hidden, ref_weight, LABELS).kl.sum().backward()
    assert ref_hidden.grad is None
    assert ref_weight.grad is None
