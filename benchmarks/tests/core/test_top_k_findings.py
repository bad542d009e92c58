"""Rows, intervals, the rule for the default k, and table and figure of `benchmarks.top_k`."""

import pytest
import torch

from benchmarks.top_k.findings import (
    LEAST_KL,
    PERTURBED,
    TRAINED,
    NoNoiseError,
    bootstrap,
    bytes_per_token,
    described,
    judge,
    rows_of,
    summed,
)
from benchmarks.top_k.noise import KS, PAIRS, measured
from benchmarks.top_k.report import plot, table

FALLING = {4: 0.5, 8: 0.3, 16: 0.2, 32: 0.09, 64: 0.06, 128: 0.03, 256: 0.01}


def judged(high, kl=0.1, kind=TRAINED):
    policies = [{"kind": kind, "kl_per_token": kl}]
    rows = [{"kind": kind, "bucket": True, "k": k, "high": value} for k, value in high.items()]
    return judge(policies, [*rows, *({**row, "bucket": False, "high": 2.0} for row in rows)])


def test_bytes_are_those_of_ids_log_probs_and_the_tail():
    assert [bytes_per_token(k) for k in (4, 64, 128)] == [36, 516, 1028]


def test_the_smallest_k_within_both_limits_is_chosen():
    found = judged(FALLING)
    assert found["k"] == 32
    assert "top:32" in found["verdict"]
    assert "260 bytes" in found["verdict"]


def test_the_upper_end_of_the_interval_decides():
    assert judged({**FALLING, 32: 0.1})["k"] == 32
    assert judged({**FALLING, 32: 0.1001})["k"] == 64


def test_what_each_limit_allows_is_reported_where_no_k_is_within_both():
    found = judged({k: 2.5 * high for k, high in FALLING.items()})  # 64: 0.15, 128: 0.075
    assert found["k"] is None
    for words in (
        "is 128, with 1028 bytes",
        "within 600 bytes is 64, with a noise of up to 0.150",
        "No k without draws is within both limits",
    ):
        assert words in found["verdict"]


def test_where_no_k_is_quiet_the_last_one_is_reported():
    found = judged(dict.fromkeys(KS, 0.4))
    assert found["k"] is None
    assert "No k up to 256" in found["verdict"]


def test_a_perturbed_policy_does_not_decide():
    assert judged(FALLING, kind=PERTURBED)["k"] is None
    trained = {"kind": TRAINED, "kl_per_token": 0.1}
    noisy = {"kind": PERTURBED, "kl_per_token": 0.001}
    rows = [{"kind": TRAINED, "bucket": True, "k": k, "high": high} for k, high in FALLING.items()]
    rows += [{"kind": PERTURBED, "bucket": True, "k": k, "high": 1.0} for k in FALLING]
    assert judge([trained, noisy], rows)["k"] == 32


def test_every_trained_policy_has_to_be_quiet():
    policies = [{"kind": TRAINED, "kl_per_token": 0.1}] * 2
    rows = [{"kind": TRAINED, "bucket": True, "k": k, "high": high} for k, high in FALLING.items()]
    rows += [{**row, "high": row["high"] * 1.5} for row in rows]
    assert judge(policies, rows)["k"] == 64
    assert judge(policies, rows[::-1])["k"] == 64


def test_a_policy_near_the_reference_decides_nothing():
    assert judged(FALLING, kl=LEAST_KL)["k"] == 32
    found = judged(FALLING, kl=0.9 * LEAST_KL)
    assert found["k"] is None
    assert found["verdict"].startswith("Undecided")


def test_interval_of_a_ratio_is_over_whole_sequences():
    below = torch.ones(50, dtype=torch.float64)
    low, high = bootstrap(torch.stack([0.25 * below, torch.arange(50.0).double()], -1), below)
    assert low[0] == high[0] == 0.25
    assert float(low[1]) == pytest.approx(24.5 - 1.96 * 14.43 / 50**0.5, rel=0.05)
    assert float(high[1]) == pytest.approx(24.5 + 1.96 * 14.43 / 50**0.5, rel=0.05)


def test_states_are_summed_by_sequence():
    found = summed(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([7, 3, 7]))
    assert found.tolist() == [[3.0, 4.0], [6.0, 8.0]]


@pytest.fixture
def results():
    generator = torch.Generator().manual_seed(0)
    ref = torch.randn(60, 600, generator=generator) * 3
    noise = measured(ref + torch.randn(ref.shape, generator=generator) * 0.3, ref)
    sequence = torch.arange(60) // 6
    found = {"policies": [], "rows": []}
    for name, kind in (("default, 45 steps", TRAINED), ("weights perturbed by 0.05", PERTURBED)):
        found["policies"].append({**described(name, kind, noise, sequence), "difference_to_library": 1e-14})
        found["rows"] += rows_of(name, kind, noise, sequence)
    return noise, found


def test_rows_have_ratios_of_sums_and_intervals(results):
    noise, found = results
    rows = {row["estimator"]: row for row in found["rows"] if row["kind"] == TRAINED}
    assert len(rows) == 2 + 2 * len(KS) + len(PAIRS)
    assert [rows["k2@loss"][name] for name in ("noise", "low", "high", "q50")] == pytest.approx([1.0] * 4)
    assert rows["exact@loss"]["noise"] == rows["exact@loss"]["high"] == 0.0
    row = rows["exact@loss/top:16"]
    column = KS.index(16)
    assert row["noise"] == pytest.approx(float(noise.bucket[:, column].sum() / noise.sampled.sum()))
    assert row["to_gradient"] == pytest.approx(float(noise.bucket[:, column].sum() / noise.gradient.sum()))
    assert row["low"] < row["noise"] < row["high"]
    assert row["q10"] < row["q50"] < row["q90"]
    assert (row["bytes_per_token"], row["bytes_per_million_tokens"]) == (132, 132_000_000)
    plain = rows["top:16 without the bucket"]
    assert plain["noise"] == pytest.approx(float(noise.plain[:, column].sum() / noise.sampled.sum()))
    assert plain["bytes_per_token"] is None
    assert found["policies"][0]["kl_low"] < found["policies"][0]["kl_per_token"] < found["policies"][0]["kl_high"]
    assert found["policies"][0]["sequences"] == 10


def test_a_policy_that_is_the_reference_is_refused():
    ref = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NoNoiseError, match="equals the reference"):
        rows_of("same", TRAINED, measured(ref, ref), torch.arange(4))


@pytest.mark.parametrize("smoke", [False, True])
def test_table_and_figure(results, smoke, tmp_path):
    pytest.importorskip("matplotlib")
    _, found = results
    found |= {
        "settings": {"model": "models/some-model", "task": "letter", "tokens": 24}, "smoke": smoke,
        "machine": {"gpu": None, "processor": "P", "torch": "2"}, **judge(found["policies"], found["rows"]),
    }  # fmt: skip
    text = table(found)
    assert found["verdict"] in text
    assert ("mean nothing" in text) == smoke
    assert text.count("exact@loss/top:64 ") == 2
    assert max(map(len, text.splitlines())) < 240
    plot(tmp_path / "top_k.png", found)
    assert (tmp_path / "top_k.png").stat().st_size > 10_000
    assert len(list(tmp_path.iterdir())) == 1
