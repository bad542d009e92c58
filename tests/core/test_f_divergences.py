"""The coefficients of the f-divergence rows are what f alone gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kl_plugins.estimators import find_estimator
from kl_plugins.f_divergences import derive_from_f
from tests.support.core.specs import F_DIVERGENCES


def alpha(a: float) -> Callable[[Tensor], Tensor]:
    return lambda d: (d**a - a * d + a - 1) / (a * (a - 1))


# As in the literature, f(1) = 0, no multiple of (delta - 1) taken away.
F: dict[str, Callable[[Tensor], Tensor]] = {
    "jeffreys": lambda d: (d - 1) * d.log(),
    "jsd": lambda d: (d * (2 * d / (1 + d)).log() - ((1 + d) / 2).log()) / 2,
    "hellinger": lambda d: (1 - d.sqrt()) ** 2,
    "chi2": lambda d: (d - 1) ** 2 / 2,
    "alpha-0.5": alpha(0.5),
    "alpha-1": lambda d: d * d.log() - d + 1,
    "alpha-2": alpha(2.0),
    "alpha-3": alpha(3.0),
}

# Of the KL rows: f of the divergence that their coefficient belongs to.
OF_KL: dict[str, Callable[[Tensor], Tensor]] = {
    "k2": lambda d: -d.log(),
    "k3+": lambda d: -d.log() + 7 * (d - 1),
    "k3": lambda d: d * d.log(),
}


def test_every_row_is_covered() -> None:
    assert set(F) == set(F_DIVERGENCES)


@pytest.mark.parametrize("name", [*F, *OF_KL])
def test_coefficient_follows_from_f(name: str) -> None:
    row = find_estimator(name)
    assert row is not None
    u = torch.linspace(-9, 9, 181, dtype=torch.float64)
    value, coefficient = derive_from_f((F | OF_KL)[name])
    expected = row.coefficient(u, u)
    torch.testing.assert_close(coefficient(u, u), expected, rtol=1e-10, atol=1e-12)
    assert (coefficient(torch.zeros_like(u), torch.zeros_like(u)) == 0).all()
    if name in F:
        torch.testing.assert_close(value(u, u), row.value(u, u), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", F)
def test_rows_cancel_less_than_f_does(name: str) -> None:
    # Near the reference most of f(delta) cancels; what is left in float32 must be right.
    row = find_estimator(name)
    assert row is not None
    u = torch.tensor([1e-3, -1e-3])
    exact = row.value(u.double(), u.double())
    # Three roundings of terms of size u, 2^-34 each, in the smallest difference that a row leaves, u^2 / 4.
    bound = 3 * 2.0**-34 / 0.25e-6
    torch.testing.assert_close(row.value(u, u).double(), exact, rtol=bound, atol=0)
    assert ((F[name]((-u).exp()).double() - exact).abs() > bound * exact).any() or name in (
        "jeffreys",
        "chi2",
        "hellinger",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [2, 3, 9])
def test_what_overflows_keeps_its_sign(power: int, dtype: torch.dtype) -> None:
    # delta^p - delta^(p-1): inf - inf where delta is huge.
    value, coefficient = derive_from_f(lambda d: d**power - d ** (power - 1))
    x = torch.tensor([-600.0, -60.0, -30.0, 0.0, 30.0, 60.0, 600.0], dtype=dtype)
    assert not value(x, x).isnan().any()
    assert not coefficient(x, x).isnan().any()
    assert (coefficient(x, x)[:3] < -1e10).all()
    assert (coefficient(x, x)[4:].isfinite()).all()
    nan = torch.tensor([float("nan")], dtype=dtype)
    assert value(nan, nan).isnan().all()
    assert coefficient(nan, nan).isnan().all()
