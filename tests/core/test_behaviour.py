"""Which log-probs the weight divides by, what an exact term does with them, and gradients beyond every clamp."""

from __future__ import annotations

from math import exp, expm1

import pytest
import torch

from kl_plugins import KLSpec, kl_penalty, kl_term
from kl_plugins.numerics import cast_saturating
from tests.support.core.specs import SAMPLED
from tests.support.core.tensors import batch


def weight(text: str, *, old: bool, sampler: bool) -> torch.Tensor:
    data = batch()
    given = {"old_logp": data.old if old else None, "sampler_logp": data.sampler if sampler else None}
    return kl_term(KLSpec.parse(text), data.logp, data.ref, data.mask, **given).weight


def ratio(name: str) -> torch.Tensor:
    data = batch()
    return (data.logp - getattr(data, name)).exp().masked_fill(~data.mask, 0.0)


@pytest.mark.parametrize("options", ["is:token", "clip:0.2"])
def test_choice(options: str) -> None:
    spec = f"k2@loss/{options}"
    torch.testing.assert_close(weight(spec, old=True, sampler=True), ratio("sampler"))
    torch.testing.assert_close(weight(spec, old=False, sampler=True), ratio("sampler"))
    torch.testing.assert_close(weight(spec, old=True, sampler=False), ratio("old"))
    torch.testing.assert_close(weight(f"{spec}/behaviour:old", old=True, sampler=True), ratio("old"))
    torch.testing.assert_close(weight(f"{spec}/behaviour:sampler", old=True, sampler=True), ratio("sampler"))


def test_missing_log_probs() -> None:
    for spec in ("k2@loss/is:token", "k2@loss/clip:0.2", "exact@loss/is:prefix"):
        with pytest.raises(ValueError, match="neither sampler_logp nor old_logp"):
            kl_term(KLSpec.parse(spec), *batch()[:2], batch().mask, exact=batch().exact)
    with pytest.raises(ValueError, match="needs sampler_logp, which was not given"):
        weight("k2@loss/is:token/behaviour:sampler", old=True, sampler=False)
    with pytest.raises(ValueError, match="needs old_logp, which was not given"):
        weight("k2@loss/clip:0.2/behaviour:old", old=False, sampler=True)


def test_without_a_correction_log_probs_feed_metrics_only() -> None:
    data = batch()
    spec = KLSpec.parse("k2@loss")
    alone = kl_term(spec, data.logp, data.ref, data.mask)
    assert torch.equal(alone.weight, data.mask.double())
    assert alone.metrics["kl/trust_region"] == 0
    beside = kl_term(spec, data.logp, data.ref, data.mask, old_logp=data.old, sampler_logp=data.sampler)
    for name in ("value", "coefficient", "loss", "weight"):
        assert torch.equal(getattr(beside, name), getattr(alone, name)), name
    log_rho = (data.logp - data.sampler)[data.mask]
    assert beside.metrics["kl/trust_region"].item() == pytest.approx((log_rho.exp() - 1 - log_rho).mean().item())
    assert beside.metrics["kl/ess"] == 1


def test_on_policy_the_weight_is_one_and_the_gradient_flows_once() -> None:
    data = batch().leaves()
    plain = kl_term(KLSpec.parse("k2@loss"), data.logp, data.ref, data.mask)
    for level in ("token", "prefix", "sequence"):
        # Not detached by the caller: the weight must not carry a gradient all the same.
        term = kl_term(KLSpec.parse(f"k2@loss/is:{level}"), data.logp, data.ref, data.mask, old_logp=data.logp)
        (gradient,) = torch.autograd.grad(term.loss.sum(), data.logp)
        assert torch.equal(gradient, plain.coefficient)


def test_neither_reference_nor_behaviour_gets_a_gradient() -> None:
    data = batch()
    ref, old, logp = (x.clone().requires_grad_() for x in (data.ref, data.old, data.logp))
    term = kl_term(KLSpec.parse("k2@loss/horizon:sequence/is:decision"), logp, ref, data.mask, old_logp=old)
    found = torch.autograd.grad(term.loss.sum(), (logp, ref, old), allow_unused=True)
    assert found[0] is not None
    assert found[1] is None
    assert found[2] is None


def test_exact_values_are_needed() -> None:
    data = batch()
    for text in ("exact@loss", "k2@loss/horizon:sequence/future:exact"):
        with pytest.raises(ValueError, match="pass exact="):
            kl_term(KLSpec.parse(text), data.logp, data.ref, data.mask)
    for text in ("exact@advantage", "k1@advantage/future:exact"):
        with pytest.raises(ValueError, match="pass exact="):
            kl_penalty(KLSpec.parse(text), data.logp, data.ref, data.mask)


def test_the_loss_may_be_scaled_in_place() -> None:
    data = batch().leaves()
    term = kl_term(KLSpec.parse("k2@loss"), data.logp, data.ref, data.mask)
    before = term.value.clone()
    loss = term.loss
    loss *= 3.0
    loss.sum().backward()
    assert torch.equal(term.value, before)
    torch.testing.assert_close(data.logp.grad, 3 * term.coefficient)


BEYOND = [100.0, 1e3, 1e6, 1e30]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", SAMPLED)
def test_gradients_stay_alive_beyond_every_clamp(name: str, sign: float, dtype: torch.dtype) -> None:
    sizes = [size for size in BEYOND if size < torch.finfo(dtype).max]
    u = sign * torch.tensor([sizes], dtype=dtype)
    logp = u.clone().requires_grad_()
    spec = KLSpec.parse(f"{name}@loss" + "/allow:biased" * (name == "k1"))
    term = kl_term(spec, logp, torch.zeros_like(u), torch.ones_like(u).bool())
    term.loss.sum().backward()
    assert logp.grad is not None
    assert torch.equal(logp.grad, term.coefficient)
    assert logp.grad.isfinite().all()
    assert term.value.isfinite().all()
    assert (logp.grad * (1.0 if name == "k1" else sign) > 0).all()
    # The coefficient at the clamped log-ratio: 30 nats inside an exp, 1e4 in linear uses.
    linear = torch.tensor([sizes]).clamp(max=1e4) * sign
    expected = {"k2": linear, "k3+": linear, "k3": 1 - (-linear.clamp(-30, 30)).exp(), "abs": linear.sign()}
    if name in expected:
        torch.testing.assert_close(logp.grad, cast_saturating(expected[name], dtype), rtol=1e-2, atol=0)
    assert term.metrics["kl/dead_frac"] == 0


@pytest.mark.parametrize("bound", [1e-3, 1.0, 50.0, 1e3, 1e300])
def test_a_users_bound(bound: float) -> None:
    """A bound beyond what the dtype can hold is lowered, not overflown."""
    for dtype, ceiling in ((torch.float32, 60.0), (torch.float64, 600.0)):
        logp = torch.tensor([[-1e5, 1e5]], dtype=dtype, requires_grad=True)
        mask = torch.ones(1, 2).bool()
        spec = KLSpec.parse(f"k3@loss/bound:{bound}")
        term = kl_term(spec, logp, torch.zeros_like(logp), mask)
        coefficient, held = term.coefficient, min(bound, ceiling)
        # Below -bound the linear part stops with the exponential one: the value is that at the bound, never below 0.
        value = torch.tensor(min(expm1(held) - held, 1e30 if dtype == torch.float32 else 1e250), dtype=dtype)
        torch.testing.assert_close(term.value[0, 0], value, rtol=1e-4, atol=3e-8)
        wanted = torch.tensor([[max(1 - exp(held), -1e250), 1 - exp(-held)]], dtype=dtype)
        torch.testing.assert_close(coefficient, wanted.clamp(-1e30, 1e30) if dtype == torch.float32 else wanted)


def test_overflow_of_either_sign_does_not_cancel_to_nan() -> None:
    """Own part -1e30 e^60, future part +1e30 e^60: in float32 that is -inf + inf unless each saturates."""
    logp = torch.full((1, 4), -60.0, requires_grad=True)
    for options in ("is:decision", "is:decision/gamma:0.5", "is:sequence"):
        spec = KLSpec.parse(f"chi2@loss/horizon:sequence/{options}/bound:60")
        term = kl_term(spec, logp, torch.zeros(1, 4), torch.ones(1, 4), old_logp=torch.full((1, 4), -120.0))
        assert term.coefficient.isfinite().all(), options
        assert term.metrics["kl/coef/std"].isfinite(), options
