"""Probes: sums that add up over micro-batches and ranks, and metrics that were computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kl_plugins import KLSpec
from kl_plugins.adapters.metrics import Accumulator
from kl_plugins.adapters.observe import measured
from kl_plugins.metric_names import OBSERVATION
from kl_plugins.observed import OBSERVED
from kl_plugins.probe import HostTerm, host_term, probe_metrics, probe_sums

LOG2 = math.log(2.0)

# Three tokens with the log-ratios log 2, -log 2 and 0; the last one is padding with nonsense in it.
LOGP = torch.tensor([[LOG2, -LOG2, 0.0, 7.0]], dtype=torch.float64)
REF = torch.tensor([[0.0, 0.0, 0.0, torch.nan]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True, False]])


def numbers(sums: dict[str, Tensor]) -> dict[str, float]:
    return {key: value.item() for key, value in sums.items()}


def test_coefficients_by_hand() -> None:
    # k1: 1, 1, 1. k2: log 2, -log 2, 0. k3: 1 - 1/2, 1 - 2, 0. The observed coefficient is that of k3, doubled.
    own = torch.tensor([[1.0, -2.0, 0.0, 99.0]], dtype=torch.float64)
    found = probe_metrics(numbers(probe_sums(own, LOGP, REF, MASK)))
    assert found["kl/probe/k3/cosine"] == pytest.approx(1.0)
    assert found["kl/probe/k3/norm_ratio"] == pytest.approx(0.5)
    assert found["kl/probe/k1/cosine"] == pytest.approx(-1.0 / (3**0.5 * 5**0.5))
    assert found["kl/probe/k1/norm_ratio"] == pytest.approx((3 / 5) ** 0.5)
    assert found["kl/probe/k2/cosine"] == pytest.approx(3 * LOG2 / ((2 * LOG2**2) ** 0.5 * 5**0.5))
    assert found["kl/probe/k2/norm_ratio"] == pytest.approx((2 * LOG2**2 / 5) ** 0.5)
    assert not any("host" in key or "mass" in key for key in found)


def test_weights_by_hand() -> None:
    # Ratios of policy and behaviour policy: 2, 1/2, 4 in the first row; 1/2, 2 in the second.
    rho = torch.tensor([[2.0, 0.5, 4.0], [0.5, 2.0, 9.0]], dtype=torch.float64).log()
    mask = torch.tensor([[True, True, True], [True, True, False]])
    zero = torch.zeros_like(rho)
    found = probe_metrics(numbers(probe_sums(zero, zero, zero, mask, behaviour_logp=-rho)))
    token, prefix, sequence = [2, 0.5, 4, 0.5, 2], [2, 1, 4, 0.5, 1], [4, 4, 4, 1, 1]
    for level, weights in (("token", token), ("prefix", prefix), ("sequence", sequence)):
        total, square = sum(weights), sum(weight**2 for weight in weights)
        assert found[f"kl/probe/{level}/weight"] == pytest.approx(total / 5)
        assert found[f"kl/probe/{level}/ess"] == pytest.approx(total**2 / (5 * square))
    assert not any("cosine" in key for key in found)  # the coefficient is 0, so it has no direction


def test_on_fresh_data_every_weight_is_one() -> None:
    found = probe_metrics(numbers(probe_sums(LOGP, LOGP, REF, MASK)))
    assert all(value == 1.0 for key, value in found.items() if key.endswith(("weight", "ess")))


def test_a_clamp_of_the_host_is_found_by_its_gradient() -> None:
    logp = torch.tensor([[3.0, -1.0, 0.0, 9.0]], dtype=torch.float64)

    def clamped(policy: Tensor) -> Tensor:
        return policy.square().div(2).clamp(max=2.0)  # k2 without a gradient where |u| > 2

    host = host_term(clamped, logp, in_loss=True)
    assert torch.equal(host.coefficient, torch.tensor([[0.0, -1.0, 0.0, 0.0]], dtype=torch.float64))
    found = probe_metrics(numbers(probe_sums(logp, logp, torch.zeros_like(logp), MASK, host=host)))
    assert found["kl/probe/host/dead_frac"] == pytest.approx(1 / 3)  # the third has no gradient and no log-ratio
    assert found["kl/probe/host/cosine"] == pytest.approx(1 / 10**0.5)
    assert found["kl/probe/host/norm_ratio"] == pytest.approx(1 / 10**0.5)
    penalty = host_term(clamped, logp, in_loss=False)
    assert torch.equal(penalty.coefficient, torch.tensor([[2.0, 0.5, 0.0, 2.0]], dtype=torch.float64))
    assert not penalty.coefficient.requires_grad


def test_kept_mass_by_hand() -> None:
    mass = torch.tensor([[0.9, 0.8, 1.0, 0.1]], dtype=torch.float64).log()
    found = probe_metrics(numbers(probe_sums(LOGP, LOGP, REF, MASK, log_mass=mass)))
    assert found["kl/probe/kept_mass"] == pytest.approx(0.9)
    mass[0, 1] = torch.nan  # a sampler that left one out
    found = probe_metrics(numbers(probe_sums(LOGP, LOGP, REF, MASK, log_mass=mass)))
    assert found["kl/probe/kept_mass"] == pytest.approx(0.95)


def test_nothing_at_all_gives_no_metrics() -> None:
    assert probe_metrics({}) == {}
    assert probe_metrics(numbers(probe_sums(LOGP, LOGP, REF, MASK & False))) == {}


def test_parts_join_into_the_whole() -> None:
    random = torch.Generator().manual_seed(3)
    logp, ref, old, sampler = (torch.randn(6, 5, dtype=torch.float64, generator=random) for _ in range(4))
    mask = torch.rand(6, 5, generator=random) < 0.7
    spec = KLSpec.parse("k2@loss/is:token")

    def found(rows: list[list[int]], probed: bool = True, truncated: bool = True) -> dict[str, float]:
        accumulator = Accumulator()
        for part in rows:
            host = HostTerm(-ref[part], logp[part])
            one = measured(
                spec, logp[part], ref[part], mask[part], old=old[part], sampler=sampler[part], probing=probed,
                host=host, truncated=truncated,
            )  # fmt: skip
            accumulator.add(one.metrics, one.kept, 0.1)
        return accumulator.total()

    whole = found([list(range(6))])
    assert {key for key in whole if key in OBSERVATION} == set(OBSERVATION)
    assert found([[0], [1, 2, 3], [4, 5]]) == pytest.approx(whole)
    assert {key for key in found([[0, 1], [2, 3, 4, 5]], probed=False) if key in OBSERVATION} == {OBSERVED}
    assert set(OBSERVATION) - set(found([list(range(6))], truncated=False)) == {"kl/probe/kept_mass"}
