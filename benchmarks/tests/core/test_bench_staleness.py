"""The toy of stale data: its forces against numbers worked out by hand, its runs, and what the command writes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.intervals import wilson
from benchmarks.staleness import forces
from benchmarks.staleness.dynamics import Course, Setting, divergence, draw, kl_loss, simulate
from benchmarks.staleness.findings import listed
from benchmarks.staleness.outcomes import ARMS, counted, noisy
from kl_plugins import KLSpec

U3 = math.exp(-3)


@pytest.mark.parametrize(
    ("spec", "ratio", "sampler", "expected"),
    [
        ("k2@loss", U3, 1.0, 3.0),
        ("k2@loss", U3, 0.1, 0.3),
        ("k2@loss", U3, None, 0.149361),  # 3 exp(-3): on fresh data the unweighted pull fades as the weighted one
        ("k2@loss/is:token", U3, 1.0, 0.149361),
        ("k2@loss/is:token", U3, 0.1, 0.149361),  # m drops out
        ("k2@loss/is:token", math.exp(-1), 1.0, 0.367879),
        ("k2@loss/is:token/floor:0.5", U3, 1.0, 1.5),
        ("k2@loss/is:token/floor:0.5", U3, 10.0, 15.0),
        ("k2@loss/is:token/floor:0.5", math.exp(-0.5), 1.0, 0.303265),  # the weight is 0.61: no floor
        ("k2@loss/is:token/cap:2", 4.0, 1.0, -2.772589),
        ("k2@loss/is:token/cap:2", U3, 1.0, 0.149361),
        ("k2@loss/is:token/band:0.5-2", 4.0, 1.0, 0.0),
        ("k2@loss/is:token/band:0.5-2", 0.4, 1.0, 0.0),
        ("k2@loss/is:token/band:0.5-2", 0.6, 1.0, 0.306495),
        ("k2@loss/clip:0.2", 0.5, 0.1, 0.0),  # the weight is 5 and u < 0: past the clip
        ("k2@loss/clip:0.2", U3, 1.0, 0.149361),
        ("k3@loss/is:token", U3, 1.0, 0.950213),
        ("jeffreys@loss/is:token", U3, 1.0, 1.099574),
        ("hellinger@loss/is:token", 0.25, 1.0, 0.25),
        ("chi2@loss/is:token", 0.1, 1.0, 4.95),
    ],
)
def test_pulls_are_those_worked_out_by_hand(spec, ratio, sampler, expected):
    found = forces.pull(KLSpec.parse(spec), torch.tensor([ratio], dtype=torch.float64), sampler)
    assert found.item() == pytest.approx(expected, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize(
    ("spec", "at_exp_minus_3", "deepest"),
    [
        ("k2@loss", 4.5, 95.434),  # u^2 / 2
        ("k2@loss/is:token", 0.800852, 0.999985),  # 1 - (1 - u) exp(u): never above 1
        ("k2@loss/is:token/floor:0.5", 2.283313, 47.751),  # from u = -log 2 on a parabola
    ],
)
def test_wells(spec, at_exp_minus_3, deepest):
    ratio = forces.grid()
    well = forces.potential(ratio, forces.pull(KLSpec.parse(spec), ratio))
    where = torch.tensor(-3.0, dtype=torch.float64)
    left = int(torch.searchsorted(ratio.log(), where)) - 1
    share = (where - ratio[left].log()) / (ratio[left + 1] / ratio[left]).log()
    assert torch.lerp(well[left], well[left + 1], share).item() == pytest.approx(at_exp_minus_3, rel=1e-3)
    assert well[0].item() == pytest.approx(deepest, rel=1e-3)
    assert well.min() >= 0


def test_way_back_of_a_suppressed_token():
    ratio = forces.grid()
    unweighted, weighted, banded = (
        forces.time_back(ratio, forces.pull(KLSpec.parse(spec), ratio), 1e-4)
        for spec in ("k2@loss", "k2@loss/is:token", "k2@loss/is:token/band:0.5-2")
    )
    # The integral of du / -u is log(u0 / u1), with u0 = -4 log 10 and u1 = -0.3 log 10.
    assert unweighted == pytest.approx(math.log(4 / 0.3), rel=1e-3)
    assert 1000 < weighted < 1500
    assert banded == math.inf


def test_divergences_whose_pull_survives_the_weight():
    ratio = forces.grid()
    found = {c.estimator: forces.trend(ratio, c.pulls) for c in forces.curves(ratio)
             if c.treatment == "token weight" and c.sampler == 1.0}  # fmt: skip
    assert found == {
        "k1": "pushes down", "k2": "fades", "k3": "holds", "k3+": "fades", "abs": "fades", "jeffreys": "holds",
        "jsd": "fades", "hellinger": "fades", "chi2": "grows", "alpha-0.5": "fades", "alpha-2": "grows",
    }  # fmt: skip


def test_only_k1_is_without_a_floor():
    assert [spec for spec in forces.refused() if "floor" in spec] == ["k1@loss/is:token/floor:0.5/allow:biased"]


def test_the_weighted_expectation_is_the_gradient_of_the_kl():
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    reference, sampler = (torch.randn(3, 5, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    wanted = torch.autograd.grad(divergence(logits.log_softmax(-1), reference).sum(), logits)[0]
    for text in ("k2@loss/is:token", "exact@loss"):
        loss = kl_loss(KLSpec.parse(text), logits.log_softmax(-1), reference, sampler, None)
        torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], wanted)
    # Drawing every token once under a uniform sampler is the expectation.
    uniform, every = torch.full((3, 5), 0.2, dtype=torch.float64).log(), torch.arange(5).expand(3, 5)
    loss = kl_loss(KLSpec.parse("k2@loss/is:token"), logits.log_softmax(-1), reference, uniform, every)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], wanted)


def test_draws_follow_the_sampler():
    logp = torch.tensor([[0.1, 0.6, 0.3], [0.9, 0.1, 0.0]], dtype=torch.float64).log()
    drawn = draw(logp, 20_000, torch.Generator().manual_seed(0))
    for row, expected in zip(drawn, logp.exp(), strict=True):
        assert torch.bincount(row, minlength=3).div(20_000).sub(expected).abs().max() < 0.02


def test_without_noise_every_term_converges():
    setting = Setting(samples=0, updates=130, runs=16)
    for arm, text in ARMS.items():
        course = simulate(KLSpec.parse(text), setting).divergence
        share = course[-1] / course[0]
        assert share.median() < (0.1 if "band" in arm else 1e-3), arm
        # A band gives tokens outside it no pull, so single runs wait for the sampler's next renewal.
        assert "band" in arm or share.max() < 0.05, arm


def test_without_noise_plain_gradient_steps_converge():
    setting = Setting(optimizer="sgd", rate=4.0, samples=0, updates=130, runs=16)
    for text in ("k2@loss", "k2@loss/is:token", "k2@loss/is:token/floor:0.5"):
        course = simulate(KLSpec.parse(text), setting).divergence
        assert (course[-1] / course[0]).max() < 0.06, text


def test_fresh_data_make_all_k2_terms_one():
    setting = Setting(delay=1, updates=20, runs=8)
    courses = [simulate(KLSpec.parse(text), setting).divergence for text in ARMS.values() if text.startswith("k2")]
    assert len(courses) == 10
    assert all(torch.equal(course, courses[0]) for course in courses)


def test_noise_carries_the_weighted_runs_away_and_a_floor_holds_them():
    setting = noisy(Setting(runs=128))
    alone = simulate(None, setting)
    unweighted, weighted, floored = (
        counted(simulate(KLSpec.parse(text), setting), alone)
        for text in ("k2@loss", "k2@loss/is:token", "k2@loss/is:token/floor:1")
    )
    assert weighted["low"] > 3 * unweighted["high"]
    assert weighted["low"] > 2 * floored["high"]
    assert weighted["final_kl"]["median"] > 2 * unweighted["final_kl"]["median"]


def test_a_lagging_sampler_and_runs_without_any_gradient():
    still = simulate(None, Setting(updates=3, runs=4)).divergence
    assert torch.equal(still[0], still[-1])
    spec, setting = KLSpec.parse("k2@loss"), Setting(updates=6, runs=4, delay=3)
    lagging = replace(setting, lagging=True)
    assert torch.equal(simulate(spec, setting).divergence[:4], simulate(spec, replace(setting, delay=9)).divergence[:4])
    assert not torch.equal(simulate(spec, setting).divergence, simulate(spec, lagging).divergence)
    with pytest.raises(ValueError, match="needs samples"):
        simulate(None, Setting(samples=0, noise=1.0))


def test_runs_are_counted_against_themselves_without_a_kl_term():
    final = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.5, 2.0, 3.0, 0.1]], dtype=torch.float64)
    alone = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 2.5, 1.0, 0.2]], dtype=torch.float64)
    found = counted(Course(final, torch.tensor([0.0, 0.5, 1.0, 0.0])), Course(alone, torch.zeros(4)))
    assert (found["away"], found["runs"]) == (1, 4)
    assert (found["low"], found["high"]) == wilson(1, 4)
    assert found["largest_kl"]["upper"] == pytest.approx(2.25)


def test_wilson():
    assert wilson(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-5)
    assert wilson(5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-5)
    assert wilson(10, 10)[1] == 1.0


def test_equal_neighbours_share_their_number():
    rows = [{"arm": "a", "x": 1}, {"arm": "b", "x": 1}, {"arm": "c", "x": 2}]
    assert listed(rows, lambda row: str(row["x"])) == "a = b 1; c 2"


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.staleness.__main__ import main

    main(out=tmp_path, runs=2, seed=1, smoke=True, redraw=False)
    data = json.loads((tmp_path / "staleness.json").read_text())
    assert data["smoke"]
    assert {row["spec"] for row in data["sweeps"]["noise, delay"]["rows"]} == set(ARMS.values())
    assert {"well", "noise", "adam", "without noise"} <= {finding["name"] for finding in data["findings"]}
    assert all("nan" not in finding["says"] for finding in data["findings"])
    for name in ("staleness.png", "staleness-checks.png"):
        assert (tmp_path / name).stat().st_size > 10_000
        (tmp_path / name).unlink()
    printed = capsys.readouterr().out
    assert "they mean nothing" in printed
    main(out=tmp_path, runs=2, seed=1, smoke=False, redraw=True)
    assert capsys.readouterr().out == printed
    assert json.loads((tmp_path / "staleness.json").read_text()) == data
    assert (tmp_path / "staleness.png").exists()
