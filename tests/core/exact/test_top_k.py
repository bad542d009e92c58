"""The KL over the reference's most probable tokens and a bucket: gradients, hostile numbers, dtypes, memory, mistakes.

That it is unbiased is shown in ``tests/oracle``.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kl_plugins import RefTopK, exact_kl, linear_kl, linear_reference_top_k, reference_top_k
from kl_plugins.exact import TopKKL
from kl_plugins.kernels.backend import BackendError
from tests.core.exact.support import norm_error

INF = math.inf
OPTIONS: list[dict[str, float]] = [
    {},
    {"temperature": 0.7},
    {"softcap": 3.0},
    {"softcap": 2.0, "temperature": 1.3},
]
TILES = 600  # bytes: two or three rows at a time
LABELS = torch.tensor([3, 0, -100, 6, 5])


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def reference(
    ref_logits: Tensor, labels: Tensor, k: int, temperature: float = 1.0, softcap: float | None = None
) -> dict[str, Any]:
    """What is passed of the reference."""
    z = ref_logits.double() if softcap is None else softcap * torch.tanh(ref_logits.double() / softcap)
    logp = (z / temperature).log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    kept = reference_top_k(ref_logits, k, temperature=temperature, softcap=softcap)
    return {"reference": kept, "ref_logp": logp.to(kept.logp.dtype)}


def textbook(logits: Tensor, given: dict[str, Any]) -> Tensor:
    """KL of set and bucket in float64, by its definition."""
    kept: RefTopK = given["reference"]
    log_p = logits.double().log_softmax(-1)
    outside = torch.ones_like(log_p, dtype=torch.bool).scatter(-1, kept.ids, False)
    log_tail = torch.logsumexp(log_p.masked_fill(~outside, -INF), -1)
    top = log_p.gather(-1, kept.ids)
    return (top.exp() * (top - kept.logp.double())).sum(-1) + log_tail.exp() * (log_tail - kept.log_tail.double())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_of_logits(options: dict[str, float]) -> None:
    given = reference(numbers(5, 7), LABELS, 3, options.get("temperature", 1.0))

    def call(logits: Tensor) -> tuple[Tensor, ...]:
        return exact_kl(logits, None, LABELS, **given, max_tile_bytes=TILES, **options)[:2]

    assert torch.autograd.gradcheck(call, numbers(5, 7, seed=6).requires_grad_())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_of_hidden_states_and_head(options: dict[str, float]) -> None:
    given = reference(numbers(5, 7), LABELS, 3, options.get("temperature", 1.0))

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        found = linear_kl(hidden, weight, None, None, LABELS, bias=bias, **given, max_tile_bytes=TILES, **options)
        return found[:2]

    leaves = numbers(5, 3, seed=1), numbers(7, 3, seed=2), numbers(7, seed=3)
    assert torch.autograd.gradcheck(call, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_hidden_states_give_what_their_logits_give(options: dict[str, float]) -> None:
    hidden, weight, bias = numbers(5, 3, seed=1), numbers(7, 3, seed=2), numbers(7, seed=3)
    logits = hidden @ weight.T + bias
    given = reference(numbers(5, 7), LABELS, 3, options.get("temperature", 1.0))
    found = linear_kl(hidden, weight, None, None, LABELS, bias=bias, **given, max_tile_bytes=TILES, **options)
    for one, other in zip(found, exact_kl(logits, None, LABELS, **given, **options), strict=True):
        torch.testing.assert_close(one, other)
    kept = linear_reference_top_k(hidden, weight, 3, bias=bias, max_tile_bytes=TILES, **options)
    for one, other in zip(kept, reference_top_k(logits, 3, **options), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hidden_states_of_every_dtype_and_rows_that_do_not_count(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 16).to(dtype), torch.randn(200, 16).to(dtype)
    labels, mask = torch.randint(0, 200, (6,)), torch.tensor([1, 1, 0, 1, 0, 1]).bool()
    logits = hidden.double() @ weight.double().T
    given = reference(logits.float() + 0.3 * torch.randn(6, 200), labels, 8)
    spoilt = RefTopK(*(part.clone() for part in given["reference"][:3]))
    for part, bad in zip(spoilt[:3], (-7, math.nan, INF), strict=True):
        part[~mask] = bad
    leaf, head = (hidden.masked_fill(~mask[:, None], math.nan).requires_grad_(), weight.clone().requires_grad_())
    found = linear_kl(leaf, head, None, None, labels, reference=spoilt, ref_logp=given["ref_logp"], mask=mask)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    wanted = textbook(exact[0] @ exact[1].T, given) * mask
    assert norm_error(found.kl.detach(), wanted.detach()) < 1e-4
    found.kl.sum().backward()
    wanted.sum().backward()
    for one, other in zip((leaf.grad, head.grad), (part.grad for part in exact), strict=True):
        assert one is not None
        assert other is not None
        assert norm_error(one, other) < max(1e-4, torch.finfo(dtype).eps)
    kept = linear_reference_top_k(hidden, weight, 8)
    torch.testing.assert_close(kept.logp.exp().sum(-1) + kept.log_tail.exp(), torch.ones(6))
    assert kept.logp.dtype == torch.float32


def test_a_frozen_head() -> None:
    weight, given = numbers(7, 3, seed=2), reference(numbers(5, 7), LABELS, 2)
    gradients = []
    for differentiable in (True, False):
        hidden = numbers(5, 3, seed=1).requires_grad_()
        found = linear_kl(hidden, weight, None, None, LABELS, **given, differentiable_logp=differentiable)
        assert found.logp.requires_grad is differentiable
        found.kl.sum().backward()
        gradients.append(hidden.grad)
    torch.testing.assert_close(*gradients)


def test_transforms_and_second_derivatives() -> None:
    given = reference(numbers(5, 7), LABELS, 3)

    def loss(logits: Tensor) -> Tensor:
        found = exact_kl(logits, None, LABELS, **given)
        return (found.kl + found.remainder * found.logp).sum()

    logits = numbers(2, 5, 7, seed=4)
    slopes = torch.func.vmap(torch.func.grad(loss))(logits)
    torch.testing.assert_close(slopes, torch.stack([torch.func.grad(loss)(one) for one in logits]))
    leaf = logits[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    torch.testing.assert_close(slope.detach(), slopes[0])
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        slope.sum().backward()


def test_the_references_top_tokens_and_their_tail() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 11)
    for k in (1, 4, 11, 20):
        found = reference_top_k(logits, k, max_tile_bytes=200)
        logp = logits.log_softmax(-1)
        torch.testing.assert_close(found.logp, logp.gather(-1, found.ids))
        torch.testing.assert_close(found.logp.exp().sum(-1) + found.log_tail.exp(), torch.ones(2, 4))
        assert found.ids.shape == (2, 4, min(k, 11))
        assert torch.equal(found.ids, logits.topk(min(k, 11), -1).indices)
        assert (found.log_tail == -INF).all() == (k >= 11)
    nothing = reference_top_k(logits[:0], 3)
    assert nothing.ids.shape == (0, 4, 3)
    assert nothing.log_tail.shape == (0, 4)


def test_a_tail_of_next_to_nothing_keeps_its_digits() -> None:
    logits = torch.tensor([[80.0, 0.0, 1.0, 2.0]])
    found = reference_top_k(logits, 1)
    assert found.log_tail.item() == pytest.approx(torch.logsumexp(logits[0, 1:], 0).item() - 80, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, ref_logits = torch.randn(2, 32, 500).to(dtype) * 2
    labels = torch.randint(0, 500, (32,))
    given = reference(ref_logits, labels, 16)
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found = exact_kl(leaf, None, labels, **given)
    wanted = textbook(exact, given)
    assert found.kl.dtype == torch.promote_types(dtype, torch.float32)
    assert norm_error(found.kl.detach(), wanted.detach()) < 1e-5
    found.kl.sum().backward()
    wanted.sum().backward()
    assert leaf.grad is not None
    assert exact.grad is not None
    assert leaf.grad.dtype == dtype
    assert norm_error(leaf.grad, exact.grad) < max(1e-4, torch.finfo(dtype).eps)


def test_16_bits_keep_small_gradients_beside_a_large_level() -> None:
    """In S the gradient is p (u - mean), written as such: it must not be what is left of two rounded parts."""
    torch.manual_seed(0)
    ref_logits = torch.zeros(8, 300)
    ref_logits[:, :4] = 4.0
    logits = ref_logits + 0.02 * torch.randn(8, 300)
    logits[:, 4:] -= 6.0  # the bucket is far from the reference's, but light
    logits = logits.bfloat16()
    given = reference(ref_logits, torch.zeros(8, dtype=torch.int64), 4)
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    exact_kl(leaf, None, torch.zeros(8, dtype=torch.int64), **given).kl.sum().backward()
    textbook(exact, given).sum().backward()
    assert leaf.grad is not None
    assert exact.grad is not None
    assert ((leaf.grad - exact.grad).abs() <= 2**-8 * exact.grad.abs() + 1e-9).all()


def test_a_small_divergence_keeps_its_digits() -> None:
    torch.manual_seed(0)
    ref_logits = 4 * torch.randn(8, 5000)
    logits = ref_logits + 0.005 * torch.randn(8, 5000)
    labels = logits.argmax(-1)
    wanted = textbook(logits, reference(ref_logits.double(), labels, 64))
    assert wanted.max() < 1e-4
    found = exact_kl(logits, None, labels, **reference(ref_logits, labels, 64))
    assert norm_error(found.kl, wanted) < 1e-3


def test_rows_that_do_not_count_may_hold_anything() -> None:
    torch.manual_seed(0)
    logits, ref_logits, labels = torch.randn(4, 9), torch.randn(4, 9), torch.tensor([1, 2, 3, 4])
    given = reference(ref_logits, labels, 2)
    clean = exact_kl(logits, None, labels, **given)
    mask = torch.tensor([True, False, True, False])
    for bad in (math.nan, INF, -INF):
        spoilt = logits.clone()
        spoilt[~mask] = bad
        kept = given["reference"]
        ids, logp, log_tail = kept.ids.clone(), kept.logp.clone(), kept.log_tail.clone()
        ids[~mask], logp[~mask], log_tail[~mask] = 10**6, bad, bad
        leaf = spoilt.requires_grad_()
        found = exact_kl(leaf, None, labels, mask=mask, reference=RefTopK(ids, logp, log_tail),
                         ref_logp=given["ref_logp"].masked_fill(~mask, bad))  # fmt: skip
        upstream = torch.where(mask, 1.0, math.nan)
        torch.autograd.backward((found.kl, found.logp), (upstream, upstream))
        for part, wanted in zip(found[:2], clean[:2], strict=True):
            assert torch.equal(part, torch.where(mask, wanted, 0.0))
        assert torch.equal(found.remainder, torch.where(mask, clean.remainder, 0.0))
        assert leaf.grad is not None
        assert not leaf.grad[~mask].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [1.0, 100.0, 1e4])
def test_finite_logits_give_finite_results(dtype: torch.dtype, size: float) -> None:
    torch.manual_seed(0)
    logits, ref_logits = (torch.randn(2, 64, 30) * size).to(dtype)
    labels = torch.randint(0, 30, (64,))
    for k in (1, 3, 29, 30):
        given = reference(ref_logits, labels, k)
        leaf = logits.clone().requires_grad_()
        found = exact_kl(leaf, None, labels, **given)
        (gradient,) = torch.autograd.grad((found.kl + found.remainder * found.logp).sum(), leaf)
        for part in (*found, gradient):
            assert part.isfinite().all()
        assert (found.kl >= 0).all()
        inside = (given["reference"].ids == labels[:, None]).any(-1)
        assert not found.remainder[inside].any()


def test_tokens_without_mass() -> None:
    """Excluded by the policy, by the reference, or by both; empty buckets on either side."""
    logits = torch.tensor(
        [[1.0, 2.0, -INF, 0.0], [0.0, -INF, -INF, -INF], [0.0, 1.0, 2.0, 3.0], [100.0, 0.0, -100.0, 0.0]]
    )
    ref_logits = torch.tensor(
        [[2.0, 1.0, 0.0, 0.0], [0.0, 0.0, -INF, -INF], [0.0, 1.0, -INF, -INF], [0.0, 100.0, 0.0, 0.0]]
    )
    labels = torch.tensor([0, 0, 2, 0])
    for k in (1, 2, 3, 4):
        given = reference(ref_logits, labels, k)
        leaf = logits.clone().requires_grad_()
        found = exact_kl(leaf, None, labels, **given)
        (gradient,) = torch.autograd.grad((found.kl + found.remainder * found.logp).sum(), leaf)
        for part in (found.kl, found.logp, found.remainder, gradient):
            assert part.isfinite().all()
        assert (found.kl >= 0).all()
        if k >= 2:
            assert found.kl[2] > 1e3  # mass where the reference has none
    whole = exact_kl(logits, ref_logits, labels)
    torch.testing.assert_close(found.kl[[0, 1, 3]], whole.kl[[0, 1, 3]])


def test_nan_is_seen() -> None:
    logits = torch.zeros(2, 5)
    logits[0, 1] = math.nan
    found = exact_kl(logits, None, torch.tensor([0, 0]), **reference(torch.zeros(2, 5), torch.tensor([0, 0]), 2))
    assert found.kl.isnan().tolist() == [True, False]


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_ids_may_be_any_integers(integers: torch.dtype) -> None:
    given = reference(numbers(5, 7), LABELS, 3)
    narrow = given | {"reference": given["reference"]._replace(ids=given["reference"].ids.to(integers))}
    logits = numbers(5, 7, seed=6)
    for one, other in zip(
        exact_kl(logits, None, LABELS, **narrow), exact_kl(logits, None, LABELS, **given), strict=True
    ):
        assert torch.equal(one, other)


def test_shapes_are_kept_and_no_rows_are_fine() -> None:
    labels = torch.randint(0, 7, (2, 3))
    found = exact_kl(numbers(2, 3, 7), None, labels, **reference(numbers(2, 3, 7, seed=1), labels, 2))
    assert isinstance(found, TopKKL)
    assert all(part.shape == (2, 3) for part in found)
    none = labels[:0]
    empty = exact_kl(numbers(0, 3, 7), None, none, **reference(numbers(0, 3, 7), none, 2))
    assert all(part.shape == (0, 3) for part in empty)


class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest new tensor, in elements, that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, Tensor):
                held = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
                if tensor.untyped_storage().data_ptr() not in held:
                    self.elements.append(tensor.numel())
        return found


def test_nothing_as_large_as_the_logits_is_made_but_the_gradient() -> None:
    rows, vocabulary, k, tile = 64, 4000, 8, 400_000
    torch.manual_seed(0)
    logits, ref_logits, labels = torch.randn(rows, vocabulary), torch.randn(rows, vocabulary), torch.zeros(rows).long()
    allowed = max(tile // 4, 4 * rows * (k + 1))
    assert allowed < rows * vocabulary // 2
    with Peak() as peak:
        kept = reference_top_k(ref_logits, k, max_tile_bytes=tile)
    assert max(peak.elements) <= allowed
    leaf = logits.requires_grad_()
    given = {"reference": kept, "ref_logp": torch.zeros(rows), "backend": "eager", "max_tile_bytes": tile}
    with Peak() as peak:
        found = exact_kl(leaf, None, labels, **given)
    assert max(peak.elements) <= allowed
    with Peak() as peak:
        found.kl.sum().backward()
    assert sorted(n for n in peak.elements if n > allowed) == [rows * vocabulary]


def test_mistakes() -> None:
    logits, labels = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
    given = reference(torch.zeros(2, 5), labels, 2)
    kept: RefTopK = given["reference"]
    with pytest.raises(ValueError, match=r"of temperature 1.0, the policy's of 0.7"):
        exact_kl(logits, None, labels, **given, temperature=0.7)
    with pytest.raises(ValueError, match="takes the place of ref_logits"):
        exact_kl(logits, logits, labels, **given)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="needs ref_logp="):
        exact_kl(logits, None, labels, reference=kept)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="pass ref_logits, or reference="):
        exact_kl(logits, None, labels)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="outside the vocabulary of 5"):
        exact_kl(logits, None, labels, reference=kept._replace(ids=kept.ids + 4), ref_logp=torch.zeros(2))
    for wrong in (
        {"ids": kept.ids[:1]},
        {"logp": kept.logp[:, :1]},
        {"log_tail": kept.log_tail[:1]},
        {"ids": kept.ids[:, :0], "logp": kept.logp[:, :0]},
    ):
        with pytest.raises(ValueError, match="must be"):
            exact_kl(logits, None, labels, reference=kept._replace(**wrong), ref_logp=torch.zeros(2))
    with pytest.raises(ValueError, match="must be"):
        exact_kl(logits, None, labels, reference=kept, ref_logp=torch.zeros(3))
    with pytest.raises(TypeError, match="expected token ids"):
        exact_kl(logits, None, labels, reference=kept._replace(ids=kept.logp), ref_logp=torch.zeros(2))
    with pytest.raises(BackendError, match="backend='cuda': expected one of"):
        exact_kl(logits, None, labels, **given, backend="cuda")
    hidden, weight = torch.zeros(2, 3), torch.zeros(5, 3)
    with pytest.raises(ValueError, match="takes the place of ref_hidden"):
        linear_kl(hidden, weight, hidden, None, labels, **given)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="drop kl_weight"):
        linear_kl(hidden, weight, None, None, labels, **given, kl_weight=torch.ones(2))  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="pass ref_hidden and ref_weight, or reference="):
        linear_kl(hidden, weight, hidden, None, labels)  # type: ignore[call-overload]
    for k in (0, -1):
        with pytest.raises(ValueError, match=f"k={k}"):
            reference_top_k(logits, k)
        with pytest.raises(ValueError, match=f"k={k}"):
            linear_reference_top_k(hidden, weight, k)
