"""Importance weights on arrays worked out by hand."""

from __future__ import annotations

from math import exp, log

import pytest
import torch
from torch import Tensor

from kl_plugins import KLSpec, kl_term
from kl_plugins.corrections import effective_sample_size, importance_weight
from kl_plugins.numerics import Limits

# Rows: full; a hole and padding; empty. What stands outside the mask is 0 by contract.
MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()
RHO = torch.tensor([[2.0, 0.5, 4.0, 0.25], [0.5, 1.0, 8.0, 1.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
LOG_RHO = RHO.log().masked_fill(~MASK, 0.0)

WEIGHTS = {
    "token": [[2.0, 0.5, 4.0, 0.25], [0.5, 0.0, 8.0, 0.0], [0.0] * 4],
    "prefix": [[2.0, 1.0, 4.0, 1.0], [0.5, 0.0, 4.0, 0.0], [0.0] * 4],
    "sequence": [[1.0, 1.0, 1.0, 1.0], [4.0, 0.0, 4.0, 0.0], [0.0] * 4],
}
NONE = [[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0], [0.0] * 4]
EARLIER = [[1.0, 2.0, 1.0, 4.0], [1.0, 0.0, 0.5, 0.0], [0.0] * 4]


def spec_of(level: str, options: str = "") -> KLSpec:
    biased = "" if level in ("sequence", "decision") else "/allow:biased"
    return KLSpec.parse(f"k2@loss/horizon:sequence/is:{level}{options}{biased}")


def weigh(spec: KLSpec, log_rho: Tensor = LOG_RHO, mask: Tensor = MASK, **keywords: bool) -> Tensor:
    return importance_weight(spec, log_rho, mask, Limits.of(log_rho.dtype, spec.bound), **keywords).value


def close(weight: Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(weight, torch.tensor(expected, dtype=weight.dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize("level", ["token", "prefix", "sequence"])
def test_levels(level: str) -> None:
    close(weigh(spec_of(level)), WEIGHTS[level])
    close(weigh(spec_of(level), LOG_RHO.float()), WEIGHTS[level])


def test_decision_is_the_prefix_and_none_is_one() -> None:
    close(weigh(spec_of("decision")), WEIGHTS["prefix"])
    close(weigh(KLSpec.parse("k2@loss")), NONE)


@pytest.mark.parametrize("level", ["prefix", "decision"])
def test_one_token_earlier(level: str) -> None:
    close(weigh(spec_of(level), one_earlier=True), EARLIER)


def test_one_token_earlier_is_exact_beside_a_huge_ratio() -> None:
    log_rho = torch.tensor([[1e-3, 1e4, 0.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    earlier = weigh(KLSpec.parse("exact@loss/is:prefix"), log_rho, mask, one_earlier=True)
    torch.testing.assert_close(earlier, torch.tensor([[1.0, exp(1e-3), exp(30.0)]]), rtol=1e-6, atol=0)


def altered(spec: KLSpec) -> list[list[bool]]:
    return importance_weight(spec, LOG_RHO, MASK, Limits.of(torch.float64, 30.0)).altered.tolist()


def test_cap_truncates_and_band_drops() -> None:
    cap, band = spec_of("token", "/cap:2"), spec_of("token", "/band:0.5-2")
    close(weigh(cap), [[2.0, 0.5, 2.0, 0.25], [0.5, 0.0, 2.0, 0.0], [0.0] * 4])
    assert altered(cap) == [[False, False, True, False], [False, False, True, False], [False] * 4]
    # The interval is closed: 0.5 and 2 stay.
    close(weigh(band), [[2.0, 0.5, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0], [0.0] * 4])
    assert altered(band) == [[False, False, True, True], [False, False, True, False], [False] * 4]


def test_cap_comes_before_band_and_band_before_norm() -> None:
    # After the cap nothing is above 2, so a band up to 2 drops nothing large.
    close(weigh(spec_of("token", "/cap:2/band:0.5-2")), [[2.0, 0.5, 2.0, 0.0], [0.5, 0.0, 2.0, 0.0], [0.0] * 4])
    mean = (2.0 + 0.5 + 2.0 + 0.5 + 2.0) / 6  # over all six response tokens, those dropped too
    expected = [[2 / mean, 0.5 / mean, 2 / mean, 0.0], [0.5 / mean, 0.0, 2 / mean, 0.0], [0.0] * 4]
    close(weigh(spec_of("token", "/cap:2/band:0.5-2/norm")), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_floor_raises_and_comes_before_cap(dtype: torch.dtype) -> None:
    log_rho = LOG_RHO.to(dtype)
    raised = [[2.0, 0.5, 4.0, 0.5], [0.5, 0.0, 8.0, 0.0], [0.0] * 4]
    close(weigh(KLSpec.parse("k2@loss/is:token/floor:0.5"), log_rho), raised)
    close(weigh(KLSpec.parse("k2@loss/is:token/floor:1e-300"), log_rho), WEIGHTS["token"])
    spec = KLSpec.parse("k2@loss/is:token/floor:0.5/cap:2")
    close(weigh(spec, log_rho), [[2.0, 0.5, 2.0, 0.5], [0.5, 0.0, 2.0, 0.0], [0.0] * 4])
    found = importance_weight(spec, log_rho, MASK, Limits.of(dtype, 30.0))
    assert found.altered.tolist() == [[False, False, True, False], [False, False, True, False], [False] * 4]
    assert found.unraised is not None
    close(found.unraised, [[2.0, 0.5, 2.0, 0.25], [0.5, 0.0, 2.0, 0.0], [0.0] * 4])
    close(weigh(KLSpec.parse("k2@loss/is:token/floor:1/cap:1"), log_rho), NONE)


def test_a_floor_does_not_hide_what_is_not_a_number() -> None:
    log_rho = torch.tensor([[float("nan"), -3.0]])
    weight = weigh(KLSpec.parse("k2@loss/is:token/floor:0.5"), log_rho, torch.ones(1, 2, dtype=torch.bool))
    assert weight[0, 0].isnan()
    assert weight[0, 1] == 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", ["k2", "k3", "jeffreys", "alpha-0.5"])
def test_a_floor_that_no_weight_is_below_changes_no_bit(estimator: str, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(3)
    logp, ref = (-torch.rand(4, 9, generator=random).to(dtype) for _ in range(2))
    old = logp - torch.rand(4, 9, generator=random).to(dtype) / 2  # every ratio is above 1
    old[0, :3] = logp[0, :3]  # and some are 1, which a floor of 1 leaves alone
    mask = torch.rand(4, 9, generator=random) > 0.3
    found = []
    for floor in ("", "/floor:1", "/floor:0.3/cap:1e6"):
        leaf = logp.clone().requires_grad_()
        term = kl_term(KLSpec.parse(f"{estimator}@loss/is:token{floor}"), leaf, ref, mask, old_logp=old)
        (gradient,) = torch.autograd.grad(term.loss.sum(), leaf)
        found.append([term.value, term.coefficient, term.loss, term.weight, gradient, *term.metrics.values()])
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize("level", ["token", "prefix", "sequence", "decision"])
def test_norm_makes_the_mean_one(level: str) -> None:
    assert weigh(spec_of(level, "/norm"))[MASK].mean().item() == pytest.approx(1)


@pytest.mark.parametrize("shift", [-29.0, -500.0])
def test_norm_of_tiny_weights(shift: float) -> None:
    weight = weigh(spec_of("token", "/norm/bound:550"), (LOG_RHO + shift).masked_fill(~MASK, 0.0))
    assert weight[MASK].mean().item() == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("number", ["1e38", "1e39", "1e308"])
def test_numbers_that_float32_cannot_hold(number: str, dtype: torch.dtype) -> None:
    log_rho = LOG_RHO.to(dtype)
    for option in (f"/cap:{number}", f"/band:0-{number}"):
        close(weigh(spec_of("token", option), log_rho), WEIGHTS["token"])
    assert (weigh(spec_of("token", f"/band:{number}-{number}"), log_rho) == 0).all()
    spec = KLSpec.parse(f"k2@loss/clip:{number}")
    term = kl_term(spec, log_rho, torch.zeros_like(log_rho), MASK, old_logp=torch.zeros_like(log_rho))
    torch.testing.assert_close(term.coefficient, log_rho.exp() * log_rho)


def test_norm_where_band_leaves_nothing() -> None:
    assert (weigh(spec_of("token", "/band:100-200/norm")) == 0).all()


def test_cumulative_log_weights_are_clamped_after_the_sum() -> None:
    log_rho = torch.tensor([[40.0, -25.0, 30.0, -100.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    prefix = weigh(spec_of("prefix"), log_rho, mask).log()
    torch.testing.assert_close(prefix, torch.tensor([[30.0, 15.0, 30.0, -30.0]]))
    bounded = weigh(spec_of("prefix", "/bound:1e-3"), log_rho, mask)
    torch.testing.assert_close(bounded, torch.tensor([[exp(1e-3), exp(1e-3), exp(1e-3), exp(-1e-3)]]))


@pytest.mark.parametrize(
    ("weights", "ess"),
    [
        ([[1.0, 1.0, 1.0, 1.0]], 1.0),
        ([[3.0, 3.0, 3.0, 3.0]], 1.0),
        ([[5.0, 0.0, 0.0, 0.0]], 0.25),
        ([[1.0, 2.0, 3.0, 4.0]], 100 / (4 * 30)),
        ([[0.0, 0.0, 0.0, 0.0]], 0.0),
        ([[1e13, 1e13, 1e13, 1e13]], 1.0),
        ([[1e30, 1e30, 0.0, 0.0]], 0.5),
        ([[1e-30, 1e-30, 0.0, 0.0]], 0.5),
    ],
)
def test_effective_sample_size(weights: list[list[float]], ess: float) -> None:
    weight = torch.tensor(weights)
    found = effective_sample_size(weight, torch.ones_like(weight).bool())
    assert found.item() == pytest.approx(ess, rel=1e-5)
    padded = torch.nn.functional.pad(weight, (0, 3))
    mask = torch.nn.functional.pad(torch.ones_like(weight).bool(), (0, 3))
    assert effective_sample_size(padded, mask).item() == pytest.approx(ess, rel=1e-5)


def test_effective_sample_size_in_double_precision() -> None:
    weight = torch.tensor([[1e-200, 3e-200]], dtype=torch.float64)
    assert effective_sample_size(weight, weight > 0).item() == pytest.approx(0.8)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_effective_sample_size_of_nothing(shape: tuple[int, int]) -> None:
    assert effective_sample_size(torch.zeros(shape), torch.zeros(shape).bool()).item() == 0


RHOS = [0.5, 0.8, 1.0, 1.2, 2.0, 0.5, 0.8, 1.0, 1.2, 2.0, 2.0]
UPDATES = [1.0, 1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0, -1.0, 0.0]  # k' = u, both signs, and 0


def test_clip_head() -> None:
    """max(rho k', clip(rho, 0.75, 1.25) k'): rho k' where the first branch is active, ties included, else 0."""
    u, rho = torch.tensor([UPDATES], dtype=torch.float64), torch.tensor([RHOS], dtype=torch.float64)
    old = u - rho.log()
    spec = KLSpec.parse("k2@loss/clip:0.25")
    term = kl_term(spec, u, torch.zeros_like(u), torch.ones_like(u).bool(), old_logp=old)
    inside = (rho >= 0.75) & (rho <= 1.25)
    first = inside | (u > 0) & (rho > 1.25) | (u < 0) & (rho < 0.75) | (u == 0)
    torch.testing.assert_close(term.coefficient, torch.where(first, rho * u, 0.0))
    torch.testing.assert_close(term.weight, rho)
    dead = [True, False, False, False, False, False, False, False, False, True, False]
    assert (~first).tolist() == [dead]
    assert term.metrics["kl/cap_frac"].item() == pytest.approx(2 / 11)


def test_clip_head_at_a_tie() -> None:
    logp = torch.tensor([[log(1.25), log(0.75), 0.0]], dtype=torch.float64)
    old = torch.zeros_like(logp)
    edge = logp.exp()
    spec = KLSpec.parse("k2@loss/clip:0.25")
    for sign in (1.0, -1.0):
        term = kl_term(spec, logp, logp - sign, torch.ones_like(logp).bool(), old_logp=old)
        clipped = edge.clamp(0.75, 1.25)
        first = edge * sign >= clipped * sign
        torch.testing.assert_close(term.coefficient, torch.where(first, edge * sign, 0.0))


def test_clip_head_of_a_future_term() -> None:
    """k' = own + future, so the sign of the sum decides, not that of u."""
    u = torch.tensor([[1.0, -3.0]], dtype=torch.float64)
    rho = torch.tensor([[2.0, 2.0]], dtype=torch.float64)
    spec = KLSpec.parse("k2@loss/horizon:sequence/clip:0.2/allow:biased")
    term = kl_term(spec, u, torch.zeros_like(u), torch.ones_like(u).bool(), old_logp=u - rho.log())
    assert term.coefficient.tolist() == [[0.0, 0.0]]  # k' = -2 and -3, rho above the interval: clipped
    spec = KLSpec.parse("k2@loss/clip:0.2")
    term = kl_term(spec, u, torch.zeros_like(u), torch.ones_like(u).bool(), old_logp=u - rho.log())
    torch.testing.assert_close(term.coefficient, torch.tensor([[2.0, 0.0]], dtype=torch.float64))
