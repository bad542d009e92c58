"""The study's claims, their verdicts and its plan, against results made by hand; no run is made here."""

import json
import math
from pathlib import Path

import pytest

from benchmarks.reporting import finished
from benchmarks.study import summary
from benchmarks.study.claims import CLAIMS
from benchmarks.study.plan import Reference, Run, Scope, cells, chosen_claims, estimate, references, runs
from benchmarks.study.settings import Cell, Settings, run_key
from benchmarks.study.verdicts import REFUTED, REPRODUCED, UNDECIDED, Claim, Point, judge, measures
from kl_plugins import KLSpec

A, B = Point("none"), Point("k2@loss")


def claim(direction, threshold, log=False, measure="kl"):
    return Claim("c", "s", "says", ("rare",), measure, (A,), (B,), direction, threshold, log)


@pytest.mark.parametrize(
    ("direction", "threshold", "effects", "verdict"),
    [
        ("above", 0.1, [0.5, 0.6, 0.55], REPRODUCED),
        ("above", 0.1, [0.05, 0.0, 0.02], REFUTED),
        ("above", 0.1, [0.0, 0.3, 0.2], UNDECIDED),
        ("below", -0.1, [-0.5, -0.6, -0.55], REPRODUCED),
        ("below", -0.1, [0.5, 0.6, 0.55], REFUTED),
        ("below", -0.1, [-0.5, 0.6, -0.2], UNDECIDED),
        ("within", 0.1, [0.01, -0.01, 0.0], REPRODUCED),
        ("within", 0.1, [0.5, 0.51, 0.52], REFUTED),
        ("within", 0.1, [-0.5, -0.51, -0.52], REFUTED),
        ("within", 0.1, [0.0, 0.2, 0.1], UNDECIDED),
        ("above", 0.1, [0.9], UNDECIDED),
        ("above", 0.1, [], UNDECIDED),
        ("above", 0.1, [0.9, math.nan, 0.9], UNDECIDED),
    ],
)
def test_every_verdict_is_reachable(direction, threshold, effects, verdict):
    assert judge(claim(direction, threshold), effects).verdict == verdict


def test_interval_is_students():
    found = judge(claim("above", 0.0), [1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.effect == 3.0
    # sd 1.5811, standard error 0.7071, t(4) 2.776
    assert (found.low, found.high) == pytest.approx((1.0371, 4.9629), abs=1e-4)


def test_effect_is_a_paired_log_ratio():
    found = claim("above", 0.0, log=True).effect({A: {"kl": 6.0}, B: {"kl": 2.0}})
    assert found == pytest.approx(math.log(3))


def test_measures_of_a_curve():
    curve = [{"reward": r, "kl": k, "entropy": 1.0} for r, k in [(0, 1), (0.1, 1), (0.2, 1), (0.4, 2), (0.6, 4)]]
    found = measures({"curve": curve}, beta=0.2)
    assert found["objective"] == pytest.approx(0.6 - 0.2 * 4)
    assert found["kl roughness"] == pytest.approx(0.0, abs=1e-12)  # a steady trend of log KL
    assert found["reward roughness"] == pytest.approx(0.0, abs=1e-12)
    curve[3]["reward"] = 0.5
    assert measures({"curve": curve}, beta=0.2)["reward roughness"] == pytest.approx(0.2)


def test_claims_are_well_formed():
    assert len({c.name for c in CLAIMS}) == len(CLAIMS)
    keys = measures({"curve": [{"reward": 0, "kl": 1, "entropy": 1}] * 6}, 0.2).keys()
    for c in CLAIMS:
        assert c.measure in keys
        assert c.rule
        for point in c.plus + c.minus:
            assert point.arm == "none" or str(KLSpec.parse(point.arm)) == point.arm
        # A difference of logs, or of values, is one only if as many come in as go out.
        assert len(c.plus) == len(c.minus)
        if c.direction == "within":
            assert c.threshold > 0


def test_reward_placements_are_planned_on_policy_only():
    planned = cells(Scope())
    assert {c.task for c in planned} == {"rare", "common", "sums"}
    assert {c.family for c in planned} == {"qwen2", "llama"}
    assert {c.delay for c in planned} == {0, 1, 4, 16}
    assert "bf16" in {c.precision for c in planned}
    assert not [c for c in planned if "@reward" in c.arm and (c.delay or c.precision != "fp32")]
    assert len(planned) == len(set(planned))


def test_scope_narrows_the_plan():
    assert {c.arm for c in cells(Scope(arms=("none",)))} == {"none"}
    assert {c.delay for c in cells(Scope(delays=(4,)))} == {4}
    assert {c.arm for c in cells(Scope(claims=("k1-reward-stable",)))} == {"none", "k1@reward"}
    with pytest.raises(ValueError, match=r"no claim nonsense; there is drift"):
        chosen_claims(Scope(claims=("nonsense",)))


def test_key_changes_with_everything_that_makes_a_run():
    base = Settings()
    cell = Cell("rare", "qwen2", "none")
    keys = {
        run_key(base, cell, 1, "code"),
        run_key(base, cell, 2, "code"),
        run_key(base, cell, 1, "other code"),
        run_key(Settings(steps=7), cell, 1, "code"),
        run_key(Settings(beta=0.3), cell, 1, "code"),
        run_key(base, Cell("rare", "qwen2", "none", 4), 1, "code"),
        run_key(base, Cell("rare", "qwen2", "none", 0, "bf16"), 1, "code"),
        run_key(base, Cell("rare", "llama", "none"), 1, "code"),
    }
    assert len(keys) == 8
    assert run_key(base, cell, 1, "code") in keys


@pytest.mark.parametrize("text", ["", "{", '{"key": "another"}', "null"])
def test_torn_or_foreign_records_are_not_finished(text, tmp_path):
    file = tmp_path / "run.json"
    assert finished(file, "key") is None
    file.write_text(text)
    assert finished(file, "key") is None
    file.write_text('{"key": "key", "curve": []}')
    assert finished(file, "key") is not None


def test_other_settings_write_other_files(tmp_path):
    scope = Scope(claims=("drift",), families=("qwen2",))
    files = [{run.file for run in runs(scope, 2, s, tmp_path, "code")} for s in (Settings(), Settings(steps=5))]
    assert files[0].isdisjoint(files[1])
    models = [{m.folder for m in references(runs(scope, 1, s, tmp_path, "code"), s, tmp_path, "code")}
              for s in (Settings(), Settings(pretrain_steps=5))]  # fmt: skip
    assert models[0].isdisjoint(models[1])


def test_reference_without_its_description_is_not_finished(tmp_path):
    model = Reference("rare", "qwen2", "key", tmp_path)
    (tmp_path / "reference.json").write_text('{"key": "key"}')
    assert model.finished() is None
    (tmp_path / "config.json").write_text("{}")
    assert model.finished() is not None


def test_estimate_goes_by_finished_runs():
    missing = runs(Scope(claims=("drift",), families=("qwen2",)), 1, Settings(), Path(), "c")
    assert estimate(missing, [{"seconds": 10.0}], 0, Settings(), 2) == pytest.approx(len(missing) * 10 / 2)
    assert estimate(missing, [], 0, Settings(), 2) > 0


def made_up(seeds=(1, 2, 3)):
    """Records of a study in which k2 holds and k1 as a loss does not, and claims on them."""
    ends = {"none": 6.0, "k1@loss/allow:biased": 6.1, "k2@loss": 2.0}
    planned, found = [], {}
    for arm, kl in ends.items():
        for seed in seeds:
            cell = Cell("rare", "qwen2", arm)
            run = Run(cell, seed, f"{arm}{seed}", None)
            planned.append(run)
            point = {"reward": 0.5, "entropy": 3.0}
            found[run.key] = {"seconds": 1.0, "curve": [
                {"step": s, "kl": kl * s / 5 + 0.01 * seed, **point} for s in range(1, 6)
            ]}  # fmt: skip
    return planned, found


def test_summary_judges_what_is_there_and_names_nothing_else():
    planned, found = made_up()
    data = summary.summarise(planned, found, CLAIMS, {}, Settings())
    by_name = {row["claim"]: row for row in data["claims"]}
    assert by_name["k1-loss-like-none"]["verdict"] == REPRODUCED
    assert by_name["k2-holds"]["verdict"] == REPRODUCED
    assert by_name.keys() == {"drift", "k1-loss-like-none", "k2-holds"}  # no k3 was run
    assert "3 reproduced, 0 not reproduced, 0 undecided" in summary.sentence(data)
    json.dumps(data, allow_nan=False)
    assert summary.table(data).row_count == 3


def test_summary_pairs_only_seeds_that_both_have():
    planned, found = made_up()
    del found["none2"]
    data = summary.summarise(planned, found, CLAIMS, {}, Settings())
    rows = {row["claim"]: row for row in data["claims"]}
    assert rows["k2-holds"]["seeds"] == [1, 3]
