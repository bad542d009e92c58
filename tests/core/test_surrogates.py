"""Every horizon, correction and estimator against autograd of the surrogate that the formula writes."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from kl_plugins import KLSpec, kl_penalty, kl_term
from tests.support.core import surrogates
from tests.support.core.specs import F_DIVERGENCES, SAMPLED, is_biased
from tests.support.core.tensors import batch

TREATMENTS = ["", "/cap:1.2", "/band:0.5-1.6", "/norm", "/cap:1.4/band:0.7-1.4/norm"]


def futures(estimator: str, placement: str = "loss") -> list[str]:
    if estimator in F_DIVERGENCES:
        return ["own"]
    return ["exact"] if (estimator, placement) == ("exact", "advantage") else ["k1", "k3", "exact"]


def loss_specs() -> list[str]:
    found = []
    for estimator, top in (*((estimator, "") for estimator in (*SAMPLED, "exact")), ("exact", "/top:2")):
        horizons = [("token", "")] + [
            ("sequence", f"/horizon:sequence/future:{future}/gamma:{gamma}")
            for future, gamma in zip(futures(estimator), ("1", "0.7", "0.9"), strict=False)
        ]
        for (horizon, options), level in product(horizons, ("none", "token", "prefix", "sequence", "decision", "clip")):
            if (level == "decision" and horizon == "token") or (estimator == "exact" and level == "clip"):
                continue
            if estimator == "exact" and level == "token" and not top:
                continue
            biased = is_biased(estimator, "loss", horizon, level, clipped=level == "clip")
            weight = "/clip:0.3" if level == "clip" else f"/is:{level}"
            treatments = TREATMENTS if level not in ("none", "clip") else [""]
            if top and level == "token" and horizon == "token":
                treatments = [*treatments, "/floor:0.9", "/floor:0.6/cap:1.2"]
            for treatment in treatments:
                found.append(f"{estimator}@loss{top}{options}{weight}{treatment}" + "/allow:biased" * biased)
    return found


@pytest.mark.parametrize("text", loss_specs())
def test_loss(text: str) -> None:
    spec, data = KLSpec.parse(text), batch(rows=3, length=5, seed=len(text)).leaves()
    losses, values = surrogates.surrogate(
        spec, data.logp, data.ref, data.sampler, data.mask, data.exact, data.remainder
    )
    upstream = torch.linspace(-1.5, 2, losses.numel(), dtype=torch.float64).reshape_as(losses)
    wanted = torch.autograd.grad((losses * upstream).sum(), (data.logp, data.exact), allow_unused=True)
    term = kl_term(spec, data.logp, data.ref, data.mask, **data.keywords(spec))
    found = torch.autograd.grad((term.loss * upstream).sum(), (data.logp, data.exact), allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        other = torch.zeros_like(data.logp) if other is None else other
        one = torch.zeros_like(data.logp) if one is None else one
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(term.value, values, rtol=1e-10, atol=1e-12)
    assert torch.equal(term.loss, term.value)
    torch.testing.assert_close(found[0], term.coefficient * upstream, rtol=1e-12, atol=0)
    assert not term.value.requires_grad
    assert not term.coefficient.requires_grad
    assert not term.weight.requires_grad


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_gradcheck_where_the_values_slope_is_the_coefficient(estimator: str) -> None:
    spec, data = KLSpec.parse(f"{estimator}@loss" + "/allow:biased" * (estimator == "k1")), batch(rows=2, length=4)

    def loss(logp: torch.Tensor) -> torch.Tensor:
        return kl_term(spec, logp, data.ref, data.mask).loss

    assert torch.autograd.gradcheck(loss, (data.logp.clone().requires_grad_(),))


def test_gradcheck_of_an_exact_term() -> None:
    spec, data = KLSpec.parse("exact@loss"), batch(rows=2, length=4)

    def loss(exact: torch.Tensor) -> torch.Tensor:
        return kl_term(spec, data.logp, data.ref, data.mask, exact=exact).loss

    assert torch.autograd.gradcheck(loss, (data.exact.clone().requires_grad_(),))


def penalty_specs() -> list[str]:
    found = [f"{estimator}@reward" for estimator in SAMPLED]
    for estimator in (*SAMPLED, "exact"):
        found += [f"{estimator}@advantage/horizon:token"] if estimator != "exact" else []
        for future, gamma in product(futures(estimator, "advantage"), ("1", "0.6", "0")):
            found.append(f"{estimator}@advantage/horizon:sequence/future:{future}/gamma:{gamma}")
            found += [found[-1].replace("@advantage", "@advantage/top:2")] if estimator == "exact" else []
    return [
        text + "/allow:biased" * is_biased(text.split("@")[0], text.split("@")[1].split("/")[0], "", "", clipped=False)
        for text in found
    ]


@pytest.mark.parametrize("text", penalty_specs())
def test_penalty(text: str) -> None:
    spec, data = KLSpec.parse(text), batch(rows=3, length=5, seed=len(text)).leaves()
    found = kl_penalty(spec, data.logp, data.ref, data.mask, **data.exact_keywords(spec))
    wanted = surrogates.penalty(spec, data.logp.detach(), data.ref, data.mask, data.exact.detach(), data.remainder)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert not found.requires_grad


def test_live_ratio_times_k3_is_the_weighted_k2() -> None:
    """DeepSeek-V3.2's loss, gradient through the ratio, sample by sample the same as detached ratio times k2."""
    data = batch().leaves()
    live = (data.logp - data.old).exp() * surrogates.value_of("k3", data.logp - data.ref)
    (wanted,) = torch.autograd.grad(live[data.mask].sum(), data.logp)
    for text in ("deepseek-v3.2", "k2@loss/is:token/behaviour:old"):
        term = kl_term(KLSpec.parse(text), data.logp, data.ref, data.mask, old_logp=data.old)
        (found,) = torch.autograd.grad(term.loss.sum(), data.logp)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
