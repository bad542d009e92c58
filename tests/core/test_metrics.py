"""Every diagnostic against a number worked out by hand; the same keys everywhere."""

from __future__ import annotations

from math import exp, log, nan, sqrt

import pytest
import torch
from hypothesis import given, settings

from kl_plugins import KLSpec, kl_term
from kl_plugins.metrics import REDUCTIONS, penalty_metrics
from tests.support.core.specs import Written, written_specs
from tests.support.core.tensors import batch, masks

U = [[2.0, -1.0, 0.0, 9.0], [0.5, 9.0, 9.0, 9.0]]
RHO = [[2.0, 0.5, 1.0, 1.0], [4.0, 1.0, 1.0, 1.0]]
MASK = [[1, 1, 1, 0], [1, 0, 0, 0]]


def metrics(text: str) -> dict[str, float]:
    logp, rho, mask = (torch.tensor(x, dtype=torch.float64) for x in (U, RHO, MASK))
    spec = KLSpec.parse(text)
    exact = {"exact": torch.full_like(logp, 3.0)} if spec.needs_exact else {}
    found = kl_term(spec, logp, torch.zeros_like(logp), mask, old_logp=logp - rho.log(), **exact).metrics
    return {key: value.item() for key, value in found.items()}


def k3(u: float) -> float:
    return exp(-u) - 1 + u


MEAN_K1 = (2 - 1 + 0 + 0.5) / 4
MEAN_K3 = (k3(2) + k3(-1) + k3(0.5)) / 4


def test_by_hand() -> None:
    # Weights 2, 0.5, 1 and 3 (capped from 4); coefficients rho u = 4, -0.5, 0, 1.5.
    found = metrics("k2@loss/is:token/cap:3")
    mean = (4 - 0.5 + 0 + 1.5) / 4
    spread = sqrt(((4 - mean) ** 2 + (-0.5 - mean) ** 2 + mean**2 + (1.5 - mean) ** 2) / 4)
    expected = {
        "kl/value": MEAN_K3,
        "kl/reverse_k1": MEAN_K1,
        "kl/reverse_k1_is": (4 - 0.5 + 0 + 1.5) / 4,
        "kl/log_ratio/mean": (2 + 1 + 0 + 0.5) / 4,
        "kl/log_ratio/max": 2.0,
        "kl/coef/mean": mean,
        "kl/coef/std": spread,
        "kl/coef/max": 4.0,
        "kl/ess": 6.5**2 / (4 * (4 + 0.25 + 1 + 9)),
        "kl/weight/mean": 6.5 / 4,
        "kl/weight/max": 3.0,
        "kl/cap_frac": 1 / 4,
        "kl/floor_frac": 0.0,
        "kl/dead_frac": 0.0,
        "kl/disagree": abs(MEAN_K1 - MEAN_K3) / MEAN_K3,
        "kl/trust_region": ((2 - 1 - log(2)) + (0.5 - 1 - log(0.5)) + 0 + (4 - 1 - log(4))) / 4,
        "kl/active": 1.0,
    }
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_floor_raises_the_coefficients_and_leaves_what_is_said_of_the_data() -> None:
    # Weights 2, 0.75 (raised from 0.5), 1 and 3 (capped from 4); coefficients 4, -0.75, 0, 1.5.
    plain, found = metrics("k2@loss/is:token/cap:3"), metrics("k2@loss/is:token/floor:0.75/cap:3")
    assert found["kl/floor_frac"] == 1 / 4
    assert found["kl/coef/mean"] == pytest.approx((4 - 0.75 + 0 + 1.5) / 4, rel=1e-12)
    changed = {key for key, value in found.items() if value != plain[key]}
    assert changed == {"kl/floor_frac", "kl/coef/mean", "kl/coef/std"}
    everywhere = metrics("k2@loss/is:token/floor:1")
    assert everywhere["kl/floor_frac"] == 1 / 4  # a weight of exactly 1 is not raised
    assert everywhere["kl/weight/mean"] == (2 + 0.5 + 1 + 4) / 4


def test_dead_tokens() -> None:
    # Weight 0 kills 2 and 4; the token with u = 0 is not dead, its coefficient is 0 by right.
    found = metrics("k2@loss/is:token/band:0.5-1")
    assert (found["kl/dead_frac"], found["kl/cap_frac"]) == (2 / 4, 2 / 4)
    # clip: k' = u; dead where rho > 1.2 and u < 0, or rho < 0.8 and u > 0: none here, alive ones beyond it count not.
    assert metrics("k2@loss/clip:0.2")["kl/dead_frac"] == 0
    assert metrics("k3@loss")["kl/dead_frac"] == 0


def test_an_exact_own_term_is_not_dead_where_its_gradient_flows() -> None:
    found = metrics("exact@loss/is:prefix/band:0.5-1")
    # Weights one token earlier: 1, 2, 1 and 1; only the second is dropped.
    assert found["kl/dead_frac"] == 1 / 4
    assert found["kl/exact"] == 3.0


def test_exact_values_are_shown_where_they_are_known() -> None:
    assert metrics("k2@loss/horizon:sequence/future:exact")["kl/exact"] == 3.0
    assert "kl/exact" not in metrics("k2@loss")


@settings(max_examples=100)
@given(written_specs(placements=("loss",)))
def test_the_same_keys_for_every_spec_and_every_rank(written: Written) -> None:
    """Ranks reduce key by key: one key more on one of them would hang a collective."""
    spec = KLSpec.parse(written.text)
    wanted = set(REDUCTIONS) - (set() if spec.needs_exact else {"kl/exact"})
    for shape, mask in (((3, 5), "holes"), ((3, 5), "empty"), ((0, 5), "full"), ((2, 0), "full")):
        data = batch(*shape, mask).to(torch.float32)
        found = kl_term(spec, data.logp, data.ref, data.mask, **data.keywords(spec)).metrics
        assert set(found) == wanted
        for key, value in found.items():
            assert value.shape == (), key
            assert value.dtype == torch.float32, key
            assert not value.requires_grad, key
            if not data.mask.any():
                assert value.item() == (1.0 if key == "kl/active" else 0.0), key


def test_reductions_are_known_words() -> None:
    assert set(REDUCTIONS.values()) == {"mean", "max", "pooled"}
    assert {key for key, how in REDUCTIONS.items() if how == "pooled"} == {"kl/coef/std", "kl/ess", "kl/disagree"}
    assert {key for key, how in REDUCTIONS.items() if how == "max"} == {
        "kl/log_ratio/max",
        "kl/coef/max",
        "kl/weight/max",
    }


def test_disagreement_is_zero_at_the_reference() -> None:
    logp = torch.randn(2, 4)
    found = kl_term(KLSpec.parse("k2@loss"), logp, logp, torch.ones(2, 4)).metrics
    assert found["kl/disagree"] == 0
    assert found["kl/value"] == 0
    assert found["kl/dead_frac"] == 0


@pytest.mark.parametrize(("u", "wanted"), [(0.01, 0.0), (0.02, abs(0.02 - k3(0.02)) / k3(0.02))])
def test_disagreement_says_nothing_where_there_is_hardly_any_kl(u: float, wanted: float) -> None:
    """k3 is about u^2 / 2: 5e-5 nats at u = 0.01, 2e-4 at 0.02; the limit lies between them."""
    logp = torch.full((2, 3), u, dtype=torch.float64)
    found = kl_term(KLSpec.parse("k2@loss"), logp, torch.zeros_like(logp), torch.ones(2, 3)).metrics
    assert found["kl/disagree"].item() == pytest.approx(wanted, rel=1e-9)


def test_huge_coefficients_have_a_spread() -> None:
    logp = torch.tensor([[-60.0, 0.0]])
    found = kl_term(KLSpec.parse("chi2@loss/bound:60"), logp, torch.zeros(1, 2), torch.ones(1, 2)).metrics
    assert found["kl/coef/std"].item() == pytest.approx(5e29, rel=1e-5)  # of -1e30, where it saturates, and 0


def test_masked_tokens_do_not_count() -> None:
    spec = KLSpec.parse("k2@loss/is:token")
    full = batch(2, 4, "full")
    wider = batch(2, 4, "full")._replace(
        **{
            name: torch.cat([getattr(full, name), torch.full((2, 3), 7.0, dtype=torch.float64)], 1)
            for name in ("logp", "ref", "old", "sampler", "exact")
        },
        mask=torch.cat([full.mask, masks(2, 3)["empty"]], 1),
    )
    short, long = (kl_term(spec, x.logp, x.ref, x.mask, old_logp=x.old).metrics for x in (full, wider))
    for key, value in short.items():
        torch.testing.assert_close(long[key], value, msg=key)


def test_a_penalty_in_the_score_is_its_own_coefficient_with_weight_one() -> None:
    mask = torch.tensor([[True, True, False]])
    ref_logp = torch.tensor([[-1.0, -1.0, -1.0]])
    found = penalty_metrics(
        torch.tensor([[2.0, 4.0, nan]]), ref_logp + torch.tensor([[1.0, 3.0, nan]]), ref_logp, None, mask
    )
    expected = {"kl/coef/mean": 3.0, "kl/coef/std": 1.0, "kl/coef/max": 4.0, "kl/reverse_k1": 2.0, "kl/ess": 1.0}
    expected |= {"kl/weight/max": 1.0, "kl/cap_frac": 0.0, "kl/trust_region": 0.0, "kl/active": 1.0}
    expected |= {"kl/floor_frac": 0.0}
    assert {key: found[key].item() for key in expected} == pytest.approx(expected)
    assert set(found) == set(REDUCTIONS) - {"kl/exact"}
