"""Beta controllers: explicit, JSON-safe state; schedules, adaptive and dual control."""

from __future__ import annotations

import json
from math import inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kl_plugins import KLSpec, controllers
from kl_plugins.controllers import BetaSchedule, State, init, observed_kl_sums, update


def schedule(text: str) -> BetaSchedule:
    found = KLSpec.parse(f"k2@loss/beta:{text}").beta
    assert found is not None
    return found


def betas(state: State, kls: list[float], n: int = 8) -> list[float]:
    found = [state["beta"]]
    for kl in kls:
        state = update(state, kl, n)
        found.append(state["beta"])
    return found


KINDS = [None, "linear-0.1-0.3-4", "cosine-0.2-0-4", "adaptive-0.5-100", "dual-0.5-0.1"]


@pytest.mark.parametrize("text", KINDS)
def test_state_survives_a_checkpoint(text: str | None) -> None:
    kls = [0.1, 0.9, 3.0, 0.0, 0.5, 0.7]
    state = init(text and schedule(text), 0.05)
    uninterrupted = betas(state, kls)
    for stop in range(len(kls)):
        resumed = state
        for kl in kls[:stop]:
            resumed = update(resumed, kl, 8)
        loaded = json.loads(json.dumps(resumed))
        assert loaded == resumed
        assert betas(loaded, kls[stop:]) == uninterrupted[stop:]


@pytest.mark.parametrize("text", KINDS)
def test_update_changes_no_state_in_place(text: str | None) -> None:
    state = init(text and schedule(text), 0.05)
    before = json.dumps(state)
    after = update(state, 2.0, 8)
    assert json.dumps(state) == before
    assert (state["step"], after["step"]) == (0, 1)


def test_without_a_schedule_beta_is_the_hosts() -> None:
    assert betas(init(None, 0.04), [0.0, 5.0, nan, inf]) == [0.04] * 5


def test_linear() -> None:
    found = betas(init(schedule("linear-0.1-0.3-4"), 7.0), [1.0] * 6)
    assert found == pytest.approx([0.1, 0.15, 0.2, 0.25, 0.3, 0.3, 0.3], rel=1e-12)


def test_cosine() -> None:
    found = betas(init(schedule("cosine-0.2-0-4"), 7.0), [1.0] * 6)
    assert found == pytest.approx([0.2, 0.1 + 0.1 * 0.5**0.5, 0.1, 0.1 - 0.1 * 0.5**0.5, 0, 0, 0], rel=1e-12, abs=1e-17)


def test_schedules_do_not_mind_a_bad_batch() -> None:
    assert betas(init(schedule("linear-0-1-2"), 1.0), [nan, inf]) == [0.0, 0.5, 1.0]


def test_adaptive() -> None:
    """Ziegler et al.: beta *= 1 + clip(kl / target - 1, -0.2, 0.2) n / horizon."""
    state = init(schedule("adaptive-0.5-100"), 0.1)
    assert state["beta"] == 0.1
    assert update(state, 0.5, 10)["beta"] == 0.1
    assert update(state, 0.55, 10)["beta"] == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert update(state, 9.0, 10)["beta"] == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    assert update(state, 0.0, 10)["beta"] == pytest.approx(0.1 * (1 - 0.2 * 0.1))
    assert update(state, 9.0, 0)["beta"] == 0.1


def test_one_batch_beyond_the_horizon_moves_beta_by_a_fifth_at_most() -> None:
    state = init(schedule("adaptive-0.5-100"), 0.1)
    assert update(state, 9.0, 10**9)["beta"] == pytest.approx(0.12)
    assert update(state, 0.0, 10**9)["beta"] == pytest.approx(0.08)


def test_dual() -> None:
    state = init(schedule("dual-0.5-0.1"), 0.02)
    assert update(state, 0.7, 3)["beta"] == pytest.approx(0.04)
    assert update(state, 0.4, 3)["beta"] == pytest.approx(0.01)
    assert update(state, 0.0, 3)["beta"] == 0.0  # the multiplier of an inequality is not negative
    assert update(update(state, 0.0, 3), 0.6, 3)["beta"] == pytest.approx(0.01)
    assert init(schedule("dual-0-1"), 0.0)["beta"] == 0.0


@given(
    st.sampled_from(["adaptive-5e-324-5e-324", "adaptive-1e300-1e-300", "adaptive-1e-300-1e300", "dual-1e300-1e-300"]),
    st.lists(st.floats(min_value=0, allow_infinity=False), max_size=20),
    st.integers(0, 10**9),
)
def test_no_division_by_zero(text: str, kls: list[float], n: int) -> None:
    for beta in betas(init(schedule(text), 0.1), kls, n):
        assert beta >= 0
        assert beta < inf


@pytest.mark.parametrize("beta", [-0.1, nan, inf, -inf])
def test_bad_start_values(beta: float) -> None:
    for text in KINDS:
        with pytest.raises(ValueError, match="beta must be finite and >= 0"):
            init(text and schedule(text), beta)


def test_adaptive_cannot_start_from_zero() -> None:
    with pytest.raises(ValueError, match="set it to a positive start value"):
        init(schedule("adaptive-0.5-100"), 0.0)


@pytest.mark.parametrize("kl", [nan, inf, -inf])
@pytest.mark.parametrize("text", ["adaptive-0.5-100", "dual-0.5-0.1"])
def test_a_broken_kl_stops_what_depends_on_it(text: str, kl: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        update(init(schedule(text), 0.1), kl, 8)


def test_other_errors() -> None:
    state = init(schedule("dual-0.5-0.1"), 0.1)
    with pytest.raises(ValueError, match="n counts sequences"):
        update(state, 0.5, -1)
    with pytest.raises(ValueError, match="unknown beta controller 'pid'"):
        update({**state, "kind": "pid"}, 0.5, 1)


def test_observed_kl() -> None:
    logp = torch.tensor([[1.0, -2.0, 9.0], [0.0, 0.5, 9.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [0, 1, 0]])
    total, tokens = observed_kl_sums(logp, torch.zeros(2, 3), mask)
    expected = sum(torch.tensor(-u).exp().item() - 1 + u for u in (1.0, -2.0, 0.5))
    assert total.item() == pytest.approx(expected, rel=1e-6)
    assert tokens.item() == 3
    assert not total.requires_grad
    for dtype, wanted in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        sums = observed_kl_sums(logp.to(dtype), torch.zeros(2, 3, dtype=dtype), mask)
        assert [x.dtype for x in sums] == [wanted] * 2


def test_observed_kl_of_nothing_and_of_extremes() -> None:
    total, tokens = observed_kl_sums(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, 4))
    assert (total.item(), tokens.item()) == (0, 0)
    logp = torch.full((4, 4), -3e38)
    total, tokens = observed_kl_sums(logp, -logp, torch.ones(4, 4))
    assert total.isfinite()
    assert tokens == 16


@pytest.mark.parametrize("u", [-15.0, -20.0, -60.0])
@pytest.mark.parametrize("text", ["dual-0.01-0.1", "adaptive-0.01-64"])
def test_one_outlier_hardly_moves_beta(text: str, u: float) -> None:
    """One token of 100,000, against the same batch without it; k3 of it is 3e6 nats and more."""
    logp = 0.1 * torch.randn(100, 1000, generator=torch.Generator().manual_seed(0))
    mask, found = torch.ones(100, 1000), []
    for outlier in (False, True):
        if outlier:
            logp[3, 7] = u
        total, tokens = observed_kl_sums(logp, torch.zeros_like(logp), mask)
        found.append(update(init(schedule(text), 1e-3), (total / tokens).item(), 100)["beta"])
    without, with_it = found
    assert without != 1e-3
    assert abs(with_it / without - 1) < 0.2


def test_the_limit_is_zieglers() -> None:
    assert controllers.ADAPTIVE_ERROR_LIMIT == 0.2


@pytest.mark.parametrize("text", ["adaptive-0.5-1", "dual-0.5-1e300"])
def test_a_controller_that_pushes_in_vain_stops_at_the_largest_beta(text: str) -> None:
    assert betas(init(schedule(text), 0.05), [1e30] * 5000)[-1] == controllers.LARGEST_BETA
