"""dtype x shape x mask against a float64 reference; outputs keep the dtype of ``logp``."""

from __future__ import annotations

import pytest
import torch

from kl_plugins import KLSpec, kl_penalty, kl_term
from tests.support.core.tensors import Batch, batch, masks

SPECS = ["k2@loss/is:token/cap:2", "k3@loss", "jsd@loss/horizon:sequence/is:decision", "alpha-3@loss/clip:0.2"]
SPECS += ["k2@loss/horizon:sequence/gamma:0.9/is:sequence/norm", "exact@loss/horizon:sequence/is:decision"]
SPECS += ["k2@loss/is:token/floor:0.7/cap:1.2"]
SHAPES = [(1, 1), (0, 5), (3, 0), (4, 1), (1, 9), (5, 8)]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def sample(shape: tuple[int, int], mask: str, dtype: torch.dtype) -> Batch:
    rows, length = shape
    return batch(rows, length, mask, seed=rows + 10 * length).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("mask", masks(1, 1))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("text", SPECS)
def test_term(text: str, shape: tuple[int, int], mask: str, dtype: torch.dtype) -> None:
    spec, data = KLSpec.parse(text), sample(shape, mask, dtype).leaves()
    reference = data.to(torch.float64).leaves()
    term = kl_term(spec, data.logp, data.ref, data.mask, **data.keywords(spec))
    wanted = kl_term(spec, reference.logp, reference.ref, reference.mask, **reference.keywords(spec))
    term.loss.sum().backward()
    wanted.loss.sum().backward()
    pairs = {
        "value": (term.value, wanted.value),
        "coefficient": (term.coefficient, wanted.coefficient),
        "weight": (term.weight, wanted.weight),
        "loss": (term.loss, wanted.loss),
        "gradient": (data.logp.grad, reference.logp.grad),
    }
    if spec.needs_exact:
        pairs["exact gradient"] = (data.exact.grad, reference.exact.grad)
    for name, (found, exact) in pairs.items():
        assert found is not None, name
        assert exact is not None, name
        assert found.dtype == dtype, name
        assert found.shape == shape, name
        assert (found[~data.mask] == 0).all(), name
        torch.testing.assert_close(found.double(), exact, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    for key, value in term.metrics.items():
        assert value.shape == (), key
        torch.testing.assert_close(value.double(), wanted.metrics[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("text", ["k1@reward", "k1@advantage/gamma:0.9", "exact@advantage", "k3@reward/allow:biased"])
def test_penalty(text: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    for mask in masks(1, 1):
        spec, data = KLSpec.parse(text), sample(shape, mask, dtype)
        reference = data.to(torch.float64)
        exact = [{"exact": x.exact} if spec.needs_exact else {} for x in (data, reference)]
        found = kl_penalty(spec, data.logp, data.ref, data.mask, **exact[0])
        wanted = kl_penalty(spec, reference.logp, reference.ref, reference.mask, **exact[1])
        assert found.dtype == dtype
        assert found.shape == shape
        assert (found[~data.mask] == 0).all()
        torch.testing.assert_close(found.double(), wanted, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize("text", SPECS)
def test_non_contiguous_tensors(text: str) -> None:
    spec, data = KLSpec.parse(text), batch(4, 7)
    strided = Batch(*(torch.stack([x, x], -1)[..., 0] for x in data))
    turned = Batch(*(x.t().contiguous().t() for x in data))
    wanted = kl_term(spec, data.logp, data.ref, data.mask, **data.keywords(spec))
    for other in (strided, turned):
        assert not other.logp.is_contiguous()
        found = kl_term(spec, other.logp, other.ref, other.mask, **other.keywords(spec))
        torch.testing.assert_close(found.coefficient, wanted.coefficient)
        torch.testing.assert_close(found.value, wanted.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.float32, torch.bfloat16])
def test_masks_of_other_dtypes(dtype: torch.dtype) -> None:
    spec, data = KLSpec.parse("k2@loss/is:token"), batch()
    wanted = kl_term(spec, data.logp, data.ref, data.mask, old_logp=data.old)
    found = kl_term(spec, data.logp, data.ref, data.mask.to(dtype), old_logp=data.old)
    assert torch.equal(found.coefficient, wanted.coefficient)
    score = KLSpec.parse("k1@advantage")
    assert torch.equal(
        kl_penalty(score, data.logp, data.ref, data.mask.to(dtype)), kl_penalty(score, data.logp, data.ref, data.mask)
    )


def test_mixed_dtypes_compute_in_the_wider_one() -> None:
    spec, data = KLSpec.parse("k2@loss/is:token"), batch()
    found = kl_term(spec, data.logp.bfloat16(), data.ref, data.mask, old_logp=data.old)
    rounded = data.logp.bfloat16().double()
    wanted = kl_term(spec, rounded, data.ref, data.mask, old_logp=data.old)
    assert found.coefficient.dtype == torch.bfloat16
    assert torch.equal(found.coefficient, wanted.coefficient.bfloat16())
    assert found.metrics["kl/value"].dtype == torch.float64


def test_float64_is_kept() -> None:
    logp = torch.tensor([[1e-12]], dtype=torch.float64)
    term = kl_term(KLSpec.parse("k2@loss"), logp, torch.zeros_like(logp), torch.ones(1, 1).bool())
    assert term.coefficient.item() == 1e-12


def test_sixteen_bits_compute_in_float32() -> None:
    """k3 at u = 2^-8 is u^2/2: in bfloat16 arithmetic delta - 1 + u would be 0."""
    logp = torch.tensor([[2.0**-8]], dtype=torch.bfloat16)
    term = kl_term(KLSpec.parse("k3@loss"), logp, torch.zeros_like(logp), torch.ones(1, 1).bool())
    assert term.value.item() == pytest.approx(2.0**-17, rel=1e-2)


@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.float16, 65504.0), (torch.bfloat16, 1e30), (torch.float32, 1e30)]
)
def test_what_a_dtype_cannot_hold_saturates(dtype: torch.dtype, largest: float) -> None:
    logp = torch.tensor([[-60.0]], dtype=dtype, requires_grad=True)
    term = kl_term(KLSpec.parse("alpha-9@loss/bound:60"), logp, torch.zeros_like(logp), torch.ones(1, 1).bool())
    term.loss.sum().backward()
    assert logp.grad is not None
    assert term.value.item() == pytest.approx(largest, rel=4e-3)
    assert term.coefficient.item() == logp.grad.item() == pytest.approx(-largest, rel=4e-3)


def test_wrong_shapes_and_dtypes() -> None:
    spec, data = KLSpec.parse("k2@loss"), batch()
    with pytest.raises(ValueError, match=r"mask must be \(B, T\)"):
        kl_term(spec, data.logp[0], data.ref[0], data.mask[0])
    with pytest.raises(ValueError, match="ref_logp has shape"):
        kl_term(spec, data.logp, data.ref[:, :1], data.mask)
    with pytest.raises(ValueError, match="old_logp has shape"):
        kl_term(spec, data.logp, data.ref, data.mask, old_logp=data.old[:1])
    with pytest.raises(ValueError, match="exact has shape"):
        kl_term(spec, data.logp, data.ref, data.mask, exact=data.exact[..., None])
    with pytest.raises(TypeError, match=r"logp holds torch\.int64"):
        kl_term(spec, data.logp.long(), data.ref, data.mask)
    with pytest.raises(ValueError, match="is a score: use kl_penalty"):
        kl_term(KLSpec.parse("k1@reward"), data.logp, data.ref, data.mask)
    with pytest.raises(ValueError, match="is a loss: use kl_term"):
        kl_penalty(spec, data.logp, data.ref, data.mask)


@pytest.mark.parametrize("text", SPECS)
def test_autocast_and_inference_mode_change_nothing(text: str) -> None:
    spec, data = KLSpec.parse(text), batch().to(torch.float32).leaves()
    wanted = kl_term(spec, data.logp, data.ref, data.mask, **data.keywords(spec))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = kl_term(spec, data.logp, data.ref, data.mask, **data.keywords(spec))
        found.loss.sum().backward()
    assert torch.equal(found.loss, wanted.loss)
    assert data.logp.grad is not None
    assert torch.equal(data.logp.grad, wanted.coefficient)
    with torch.inference_mode():
        found = kl_term(spec, data.logp, data.ref, data.mask, **data.keywords(spec))
        assert torch.equal(found.coefficient, wanted.coefficient)
        assert not found.loss.requires_grad
