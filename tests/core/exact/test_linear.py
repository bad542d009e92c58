"""From hidden states: the same numbers as from logits, in either mode, however the tokens are laid out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kl_plugins import exact_kl, linear_kl
from tests.core.exact.linear_cases import gradients, heads
from tests.core.exact.support import norm_error, textbook


@pytest.mark.parametrize("mode", ["autograd", "loss"])
@pytest.mark.parametrize("tile", [1, 20_000, None])
def test_agrees_with_the_textbook(mode: str, tile: int | None) -> None:
    given, weights = heads(), torch.linspace(0.1, 1.0, 40)
    kl, found = gradients(given, weights, mode, max_tile_bytes=tile)
    true_kl, wanted = gradients(given, weights, "textbook")
    # What the products round, in float32, is not the kernels' doing; the KL of logits is tested to 1e-5.
    assert norm_error(kl, true_kl) < 1e-4
    for name in ("hidden", "weight"):
        assert norm_error(found[name], wanted[name].double()) < 1e-4, name


def test_the_loss_is_the_sum_of_its_rows() -> None:
    given, weights = heads(), torch.linspace(0.1, 1.0, 40)
    found = linear_kl(**given, kl_weight=weights, logp_weight=-weights)
    rows = linear_kl(**given)
    torch.testing.assert_close(found[1:], rows[:])
    torch.testing.assert_close(found.loss, (weights * rows.kl - weights * rows.logp).sum())
    assert torch.equal(linear_kl(**given, logp_weight=weights).kl, rows.kl)


@pytest.mark.parametrize("mode", ["autograd", "loss"])
@pytest.mark.parametrize("distance", [1.0, 0.1, 0.02, 0.006])
def test_bfloat16_down_to_small_divergences(mode: str, distance: float) -> None:
    """Logits that were rounded to bfloat16 would put 34 to 110 % of error into these gradients."""
    given, weights = heads(64, 512, 2000, distance=distance, dtype=torch.bfloat16), torch.rand(64)
    leaves = {name: given[name].double().requires_grad_() for name in ("hidden", "weight")}
    true = textbook(
        leaves["hidden"] @ leaves["weight"].t(),
        given["ref_hidden"].double() @ given["ref_weight"].double().t(),
        given["labels"],
    )
    assert float(true.kl.detach().mean()) > 9e-5 if distance == 0.006 else True
    (weights * true.kl).sum().backward()
    live = {name: given[name].clone().requires_grad_() for name in ("hidden", "weight")}
    if mode == "loss":
        linear_kl(**{**given, **live}, kl_weight=weights, max_tile_bytes=2**20).loss.backward()
    else:
        (weights * linear_kl(**{**given, **live}, max_tile_bytes=2**20).kl).sum().backward()
    for name in ("hidden", "weight"):
        assert norm_error(live[name].grad, leaves[name].grad) < 5e-3, name


def test_a_frozen_head_gets_no_gradient_and_the_same_result() -> None:
    given, weights = heads(), torch.linspace(0.1, 1.0, 40)
    found = []
    for options in ({"differentiable_logp": True}, {"differentiable_logp": False}, {"kl_weight": weights}):
        leaf = given["hidden"].clone().requires_grad_()
        result = linear_kl(**{**given, "hidden": leaf}, max_tile_bytes=20_000, **options)
        (result.loss if "kl_weight" in options else (weights * result.kl).sum()).backward()
        found.append(leaf.grad)
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def test_a_frozen_body_trains_the_head() -> None:
    given = heads()
    head = given["weight"].clone().requires_grad_()
    linear_kl(**{**given, "weight": head}).kl.sum().backward()
    both = {name: given[name].clone().requires_grad_() for name in ("hidden", "weight")}
    linear_kl(**{**given, **both}).kl.sum().backward()
    torch.testing.assert_close(head.grad, both["weight"].grad)


def test_layouts_of_tokens() -> None:
    given = heads()
    flat = linear_kl(**given)
    padded = {name: given[name].view(5, 8, -1) for name in ("hidden", "ref_hidden")}
    for strided in (False, True):
        if strided:
            padded = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in padded.items()}
        found = linear_kl(**{**given, **padded, "labels": given["labels"].view(5, 8)})
        torch.testing.assert_close([x.reshape(-1) for x in found], list(flat))
    empty = linear_kl(**{**given, **{name: given[name][:0] for name in ("hidden", "ref_hidden", "labels")}})
    assert empty.kl.shape == (0,)


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    given = heads()
    live = given["hidden"].clone().requires_grad_()
    with torch.no_grad():
        assert linear_kl(**{**given, "hidden": live}, kl_weight=torch.ones(40)).loss.grad_fn is None
    assert linear_kl(**given).kl.grad_fn is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    given, weights = heads(dtype=dtype), torch.linspace(0.1, 1.0, 40)
    for mode in ("autograd", "loss"):
        kl, plain = gradients(given, weights, mode)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            same_kl, same = gradients(given, weights, mode)
        assert torch.equal(kl, same_kl)
        for name in ("hidden", "weight"):
            assert torch.equal(plain[name], same[name])
        logits, ref_logits = given["hidden"] @ given["weight"].t(), given["ref_hidden"] @ given["ref_weight"].t()
        plain_kl = exact_kl(logits, ref_logits, given["labels"]).kl
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(exact_kl(logits, ref_logits, given["labels"]).kl, plain_kl)


def test_hidden_states_and_heads_of_different_dtypes() -> None:
    given = heads()
    mixed = {**given, "hidden": given["hidden"].bfloat16(), "ref_weight": given["ref_weight"].double()}
    found = linear_kl(**mixed)
    wanted = linear_kl(**{**given, "hidden": mixed["hidden"].float()})
    torch.testing.assert_close(found.kl, wanted.kl, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(300 * 32)}, "sharded head has to be gathered"),
        ({"weight": torch.zeros(0)}, "sharded head has to be gathered"),
        ({"ref_weight": torch.zeros(299, 32)}, "same vocabulary"),
        ({"labels": torch.zeros(39, dtype=torch.int64)}, "one per position"),
        ({"labels": torch.full((40,), 300)}, "label 300 is outside the vocabulary of 300"),
        ({"labels": torch.full((40,), -1)}, "label -1 is outside"),
        ({"bias": torch.zeros(299)}, "bias"),
        ({"mask": torch.ones(41)}, "one per position"),
        ({"temperature": 0.0}, "temperature"),
        ({"softcap": -1.0}, "softcap"),
        ({"kl_weight": torch.ones(3)}, "one per position"),
        ({"max_tile_bytes": 0}, "max_tile_bytes"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_kl(**{**heads(), **changes})


def test_wrong_dtypes() -> None:
    with pytest.raises(TypeError, match="labels hold"):
        linear_kl(**{**heads(), "labels": torch.zeros(40)})
    with pytest.raises(TypeError, match="expected floating point"):
        exact_kl(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="must be one"):
        exact_kl(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))
