"""The estimator table against numbers worked out by hand, limits, and extended precision."""

from __future__ import annotations

from decimal import Decimal, localcontext
from math import inf, log

import pytest
import torch
from torch import Tensor

from kl_plugins.estimators import BUILT_IN, all_estimators, find_estimator
from kl_plugins.numerics import Limits
from tests.support.core.specs import F_DIVERGENCES, SAMPLED

LN2, LN4 = log(2), log(4)

# delta = ref/policy: 1, 1/2, 2, 1/4, 4
U = [0.0, LN2, -LN2, LN4, -LN4]

VALUES = {
    "k1": U,
    "k2": [0.0, LN2**2 / 2, LN2**2 / 2, LN4**2 / 2, LN4**2 / 2],
    "k3": [0.0, LN2 - 0.5, 1 - LN2, LN4 - 0.75, 3 - LN4],
    "k3+": [0.0, LN2 - 0.5, 1 - LN2, LN4 - 0.75, 3 - LN4],
    "abs": [0.0, LN2, LN2, LN4, LN4],
    "jeffreys": [0.0, LN2 / 2, LN2, 0.75 * LN4, 3 * LN4],
    "jsd": [
        0.0,
        (0.5 * log(2 / 3) - log(3 / 4)) / 2,
        (2 * log(4 / 3) - log(3 / 2)) / 2,
        (0.25 * log(2 / 5) - log(5 / 8)) / 2,
        (4 * log(8 / 5) - log(5 / 2)) / 2,
    ],
    "hellinger": [0.0, (1 - 0.5**0.5) ** 2, (2**0.5 - 1) ** 2, 0.25, 1.0],
    "chi2": [0.0, 1 / 8, 1 / 2, 9 / 32, 9 / 2],
    "alpha-0.5": [0.0, 2 * (1 - 0.5**0.5) ** 2, 2 * (2**0.5 - 1) ** 2, 0.5, 2.0],
    "alpha-1": [0.0, 0.5 - LN2 / 2, 2 * LN2 - 1, 0.75 - LN4 / 4, 4 * LN4 - 3],
    "alpha-2": [0.0, 1 / 8, 1 / 2, 9 / 32, 9 / 2],
    "alpha-3": [0.0, 5 / 48, 4 / 6, (1 / 64 - 3 / 4 + 2) / 6, 54 / 6],
}

COEFFICIENTS = {
    "k1": [1.0, 1.0, 1.0, 1.0, 1.0],
    "k2": U,
    "k3": [0.0, 0.5, -1.0, 0.75, -3.0],
    "k3+": U,
    "abs": [0.0, 1.0, -1.0, 1.0, -1.0],
    "jeffreys": [0.0, LN2 + 0.5, -LN2 - 1, LN4 + 0.75, -LN4 - 3],
    "jsd": [0.0, -log(3 / 4) / 2, -log(3 / 2) / 2, -log(5 / 8) / 2, -log(5 / 2) / 2],
    "hellinger": [0.0, 1 - 0.5**0.5, 1 - 2**0.5, 0.5, -1.0],
    "chi2": [0.0, 3 / 8, -3 / 2, 15 / 32, -15 / 2],
    "alpha-0.5": [0.0, 2 * (1 - 0.5**0.5), 2 * (1 - 2**0.5), 1.0, -2.0],
    "alpha-1": [0.0, 0.5, -1.0, 0.75, -3.0],
    "alpha-2": [0.0, 3 / 8, -3 / 2, 15 / 32, -15 / 2],
    "alpha-3": [0.0, 7 / 24, -7 / 3, (1 - 1 / 64) / 3, -63 / 3],
}


def evaluate(name: str, u: Tensor, bound: float = 30.0) -> tuple[Tensor, Tensor]:
    row = find_estimator(name)
    assert row is not None
    limits = Limits.of(u.dtype, bound)
    views = limits.linear(u), limits.exponent(u)
    return row.value(*views), row.coefficient(*views)


def f64(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name", SAMPLED)
def test_by_hand(name: str) -> None:
    value, coefficient = evaluate(name, f64(U))
    torch.testing.assert_close(value, f64(VALUES[name]), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(coefficient, f64(COEFFICIENTS[name]), rtol=1e-12, atol=1e-14)


def test_the_table_is_the_designs() -> None:
    assert set(BUILT_IN) == {*SAMPLED, "exact"} - {name for name in SAMPLED if name.startswith("alpha-")}
    rows = {row.name: row for row in all_estimators()}
    assert {name for name, row in rows.items() if row.is_f_divergence} == set(F_DIVERGENCES) & set(BUILT_IN)
    assert all(row.source and row.value_formula and row.coefficient_formula for row in rows.values())


@pytest.mark.parametrize("name", ["k1", "k2", "k3", "abs"])
def test_the_values_slope_is_the_coefficient(name: str) -> None:
    u = torch.linspace(-6, 6, 200, dtype=torch.float64, requires_grad=True)  # 0 is not among them
    value, coefficient = evaluate(name, u)
    (slope,) = torch.autograd.grad(value.sum(), u)
    torch.testing.assert_close(slope, coefficient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["k3+", *F_DIVERGENCES])
def test_elsewhere_it_is_not(name: str) -> None:
    u = f64([-2.0, -0.5, 0.5, 2.0]).requires_grad_()
    value, coefficient = evaluate(name, u)
    (slope,) = torch.autograd.grad(value.sum(), u)
    assert ((slope - coefficient).abs() > 1e-2).all()


def test_rows_that_are_one_divergence() -> None:
    u = torch.linspace(-8, 8, 201, dtype=torch.float64)
    torch.testing.assert_close(evaluate("alpha-1", u)[1], evaluate("k3", u)[1], rtol=0, atol=0)
    for one, other in (("alpha-2", "chi2"), ("k3+", "k3")):
        torch.testing.assert_close(evaluate(one, u)[0], evaluate(other, u)[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(evaluate("alpha-2", u)[1], evaluate("chi2", u)[1], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(evaluate("alpha-0.5", u)[1], 2 * evaluate("hellinger", u)[1], rtol=1e-12, atol=1e-14)
    jeffreys = evaluate("k2", u)[1] + evaluate("k3", u)[1]
    torch.testing.assert_close(evaluate("jeffreys", u)[1], jeffreys, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "slope", "right"),
    [
        ("k2", 1.0, 30.0),
        ("k3", 1.0, 1.0),
        ("jeffreys", 2.0, 31.0),
        ("jsd", 0.25, log(2) / 2),
        ("hellinger", 0.5, 1.0),
        ("chi2", 1.0, 0.5),
        ("alpha-0.25", 1.0, 4.0),
        ("alpha-4", 1.0, 0.25),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coefficient_near_and_far(name: str, slope: float, right: float, dtype: torch.dtype) -> None:
    near = torch.tensor([-1e-6, 1e-6], dtype=dtype)
    torch.testing.assert_close(evaluate(name, near)[1], slope * near, rtol=1e-5, atol=0)
    far = evaluate(name, torch.tensor([30.0], dtype=dtype))[1]
    torch.testing.assert_close(far, torch.tensor([right], dtype=dtype), rtol=3e-3, atol=0)


HOSTILE = [0.0, -0.0, 1e-45, 1e-30, 1e-8, 1e-4, 0.1, 1.0, 5.0, 29.9, 30.0, 31.0, 1e2, 1e3, 1e4, 1e6, 1e30, 3e38]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bound", [1e-3, 1.0, 30.0, 1e3, 1e300])
@pytest.mark.parametrize("name", ["k2", "k3", "abs", *F_DIVERGENCES, "alpha-1e-300", "alpha-1e300", "alpha-0.001"])
def test_divergences_are_not_negative_anywhere(name: str, bound: float, dtype: torch.dtype) -> None:
    u = torch.tensor(HOSTILE + [-x for x in HOSTILE], dtype=dtype)
    value, coefficient = evaluate(name, u, bound)
    assert (value >= 0).all()
    assert not coefficient.isnan().any()
    # The coefficient has the sign of u: it pulls back from either side.
    assert (coefficient * u.sign() >= 0).all()
    assert (coefficient[u.abs() >= 1e-4] != 0).all()


@pytest.mark.parametrize(
    "a", ["1e-20", "1e-6", "0.001", "0.3", "0.4999", "0.5", "0.9999999", "1", "1.0000001", "2", "7.5"]
)
def test_alpha_against_extended_precision(a: str) -> None:
    points = ["-12", "-3.25", "-0.5", "-0.015625", "0.015625", "0.5", "3.25", "12"]
    value, coefficient = evaluate(f"alpha-{a}", f64([float(u) for u in points]))
    for k, text in enumerate(points):
        with localcontext() as context:
            context.prec = 80
            u, order = Decimal(text), Decimal(a)
            delta, power = (-u).exp(), (-order * u).exp()
            if order == 1:
                divergence = -u * delta - delta + 1
            else:
                divergence = (power - order * delta + order - 1) / (order * (order - 1))
            own = (1 - power) / order
        assert value[k].item() == pytest.approx(float(divergence), rel=2e-10)
        assert coefficient[k].item() == pytest.approx(float(own), rel=1e-12)


@pytest.mark.parametrize("name", SAMPLED)
def test_float32_agrees_with_float64(name: str) -> None:
    u = torch.linspace(-25, 25, 501)
    value, coefficient = evaluate(name, u)
    exact_value, exact_coefficient = evaluate(name, u.double())
    torch.testing.assert_close(value.double(), exact_value, rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(coefficient.double(), exact_coefficient, rtol=2e-4, atol=1e-6)


def test_a_nan_is_to_be_seen() -> None:
    for name in SAMPLED:
        value, coefficient = evaluate(name, f64([float("nan")]))
        assert value.isnan().all(), name
        assert coefficient.isnan().all() or name == "abs", name  # torch's sign of NaN is 0


def test_infinite_log_ratios_saturate() -> None:
    for name in SAMPLED:
        value, coefficient = evaluate(name, f64([inf, -inf]))
        assert value.isfinite().all(), name
        assert coefficient.isfinite().all(), name
