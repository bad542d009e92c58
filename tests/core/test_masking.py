"""What stands outside the mask (NaN, inf, huge numbers) reaches no output, no metric and no gradient."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
from torch import Tensor

from kl_plugins import KLSpec, kl_penalty, kl_term
from kl_plugins.controllers import observed_kl_sums
from tests.support.core.tensors import Batch, batch

SPECS = ["k2@loss", "k2@loss/is:token/cap:2", "k3@loss/is:prefix/band:0.5-2", "k2@loss/horizon:sequence/is:decision"]
SPECS += ["jsd@loss/horizon:sequence/is:sequence/norm", "k2@loss/clip:0.2", "abs@loss", "alpha-2@loss/is:prefix/norm"]
SPECS += ["exact@loss/is:prefix", "exact@loss/horizon:sequence/is:decision/gamma:0.5"]
SPECS += ["k3+@loss/horizon:sequence/future:exact/is:decision/norm", "k1@loss/allow:biased"]
FIELDS = ("logp", "ref", "old", "sampler", "exact")
FULL_ROWS = ["holes", "padded", "one-empty-row"]


def poisoned(data: Batch, poison: float, fields: tuple[str, ...]) -> Batch:
    return data._replace(**{name: getattr(data, name).masked_fill(~data.mask, poison) for name in fields})


def outputs(spec: KLSpec, data: Batch, upstream: Tensor) -> dict[str, Tensor]:
    data = data.leaves()
    term = kl_term(spec, data.logp, data.ref, data.mask, **data.keywords(spec))
    term.loss.backward(upstream)
    found = {"value": term.value, "coefficient": term.coefficient, "weight": term.weight, "loss": term.loss}
    found["gradient"] = data.logp.grad  # type: ignore[assignment]
    if spec.estimator == "exact":
        found["exact gradient"] = data.exact.grad  # type: ignore[assignment]
    for name, tensor in found.items():
        assert (tensor[~data.mask] == 0).all(), name
    return found | term.metrics


@pytest.mark.parametrize("poison", [nan, inf, -inf, 1e300, 0.0])
@pytest.mark.parametrize("mask", FULL_ROWS)
@pytest.mark.parametrize("text", SPECS)
def test_nothing_leaks_from_inputs(text: str, mask: str, poison: float) -> None:
    spec, data = KLSpec.parse(text), batch(4, 7, mask)
    upstream = torch.linspace(0.5, 2, data.mask.numel(), dtype=torch.float64).reshape_as(data.logp)
    clean = outputs(spec, data, upstream)
    for fields in (*[(name,) for name in FIELDS], FIELDS):
        for name, tensor in outputs(spec, poisoned(data, poison, fields), upstream).items():
            assert torch.equal(tensor, clean[name]), (fields, name)


@pytest.mark.parametrize("poison", [nan, inf, -inf])
@pytest.mark.parametrize("text", SPECS)
def test_nothing_leaks_from_the_upstream_gradient(text: str, poison: float) -> None:
    spec, data = KLSpec.parse(text), batch(4, 7)
    upstream = torch.ones_like(data.logp)
    clean = outputs(spec, data, upstream)
    for name, tensor in outputs(spec, data, upstream.masked_fill(~data.mask, poison)).items():
        assert torch.equal(tensor, clean[name]), name


@pytest.mark.parametrize("poison", [nan, inf, -inf, 1e300])
@pytest.mark.parametrize("text", ["k1@reward", "k3@reward/allow:biased", "k1@advantage/gamma:0.5", "exact@advantage"])
def test_nothing_leaks_into_penalties(text: str, poison: float) -> None:
    spec, data = KLSpec.parse(text), batch(4, 7)
    results = []
    for x in (data, poisoned(data, poison, FIELDS)):
        results.append(kl_penalty(spec, x.logp, x.ref, x.mask, **({"exact": x.exact} if spec.needs_exact else {})))
    assert torch.equal(*results)
    assert (results[1][~data.mask] == 0).all()


def test_nothing_leaks_into_the_observed_kl() -> None:
    data = batch(4, 7)
    other = poisoned(data, nan, FIELDS)
    clean, found = (observed_kl_sums(x.logp, x.ref, x.mask) for x in (data, other))
    assert found == clean


def test_a_tokens_gradient_does_not_depend_on_padding_length() -> None:
    for text in SPECS:
        spec, data = KLSpec.parse(text), batch(3, 5, "full")
        longer = Batch(*(torch.nn.functional.pad(x, (2, 3), value=0) for x in data))
        upstream = torch.ones_like(data.logp)
        short, long = outputs(spec, data, upstream), outputs(spec, longer, torch.ones_like(longer.logp))
        for name in ("value", "coefficient", "weight", "gradient"):
            torch.testing.assert_close(long[name][:, 2:7], short[name], msg=f"{text}: {name}")


@pytest.mark.parametrize("text", ["k2@loss", "k3@loss", "k2@loss/is:token", "exact@loss"])
def test_a_nan_on_a_response_token_is_to_be_seen(text: str) -> None:
    spec, data = KLSpec.parse(text), batch(2, 3, "full")
    name = "exact" if spec.needs_exact else "logp"
    getattr(data, name)[0, 0] = nan
    term = kl_term(spec, data.logp, data.ref, data.mask, **data.keywords(spec))
    assert term.loss[0, 0].isnan()
    assert term.loss[1].isfinite().all()
