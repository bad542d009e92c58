"""The rules by which the default is chosen, against records made by hand; no run is made here."""

import json
from dataclasses import replace
from math import isinf
from pathlib import Path

import pytest

from benchmarks.study.comparison import Options
from benchmarks.study.stale import arms, rules, summary
from benchmarks.study.stale.arms import ELIGIBLE, EXACT, LOCAL, NONE, REPORTED, TODAY, TOP_K, UNWEIGHTED, Place
from benchmarks.study.stale.runs import planned
from kl_plugins import KLSpec

BETA = 0.2
FRESH, STALE = Place("rare", "qwen2", 0), Place("rare", "qwen2", 16)


def record(reward=0.5, kl=2.0, early=None, middle=None):
    """A curve that ends with this reward and KL."""
    kls = {0: 0.0, 45: early or kl, 60: middle or kl, 300: kl}
    return {"curve": [{"step": step, "reward": reward, "kl": value} for step, value in kls.items()], "seconds": 1.0}


def records(changed=None, seeds=(1, 2, 3, 4, 5), places=(FRESH, STALE)):
    """A study in which every arm is held alike, but for what is changed: (place, arm, seed or None) -> record."""
    found = {}
    for place in places:
        for seed in seeds:
            found[place, NONE, seed] = record(0.9, 8.0)
            for arm in (*LOCAL, *TOP_K):
                found[place, arm, seed] = record(0.5, 2.0 + 0.01 * seed)
    for (place, arm, seed), other in (changed or {}).items():
        for one in seeds if seed is None else (seed,):
            found[place, arm, one] = other
    return found


def outcomes(changed=None, **how):
    return rules.outcomes(records(changed, **how), BETA)


def one(known, place, arm, seed=1):
    return next(o for o in known if (o.place, o.arm, o.seed) == (place, arm, seed))


def test_kl_above_that_of_no_kl_term_is_running_away_from_step_60_on():
    known = outcomes({(STALE, TODAY, 1): record(middle=8.5), (STALE, TODAY, 2): record(early=9.0)})
    assert one(known, STALE, TODAY, 1).excursion == pytest.approx(0.5)
    assert one(known, STALE, TODAY, 1).ran_away
    assert not one(known, STALE, TODAY, 2).ran_away


def test_each_run_is_compared_with_the_seed_of_its_own():
    known = outcomes({(STALE, NONE, 1): record(0.9, 1.5)})
    assert one(known, STALE, UNWEIGHTED, 1).above
    assert not one(known, STALE, UNWEIGHTED, 2).above


def test_less_than_a_third_of_the_reward_with_fresh_data_is_running_away():
    known = outcomes({(STALE, TODAY, 1): record(reward=0.16), (STALE, TODAY, 2): record(reward=0.17)})
    assert one(known, STALE, TODAY, 1).lost
    assert not one(known, STALE, TODAY, 1).above
    assert not one(known, STALE, TODAY, 2).ran_away
    assert one(known, FRESH, TODAY).kept is None


def test_runs_without_their_partners_are_not_judged():
    found = records()
    del found[STALE, NONE, 1], found[FRESH, TODAY, 2]
    known = rules.outcomes(found, BETA)
    assert not [o for o in known if o.place == STALE and o.seed == 1]
    assert not [o for o in known if o.arm == TODAY and o.seed == 2]
    assert not [o for o in known if o.arm == NONE]


@pytest.mark.parametrize(
    ("count", "of", "bound"), [(0, 5, 0.4507), (0, 80, 0.0368), (1, 5, 0.6574), (5, 5, 1.0), (2, 20, 0.2826)]
)
def test_upper_bound_is_clopper_and_pearsons(count, of, bound):
    assert rules.upper_bound(count, of) == pytest.approx(bound, abs=1e-4)


def test_shortfall_is_paired_and_against_the_best_token_local_arm():
    known = outcomes({(STALE, EXACT, None): record(0.6, 2.0), (STALE, NONE, None): record(0.99, 9.0)})
    found = {gap.place: gap for gap in rules.shortfalls(TODAY, known)}
    assert found[STALE].best == EXACT
    assert found[STALE].mean == pytest.approx(0.1 + BETA * 0.03)
    assert found[STALE].low < found[STALE].mean < found[STALE].high
    assert found[FRESH].mean == pytest.approx(0.0)
    assert isinf(rules.shortfalls(TODAY, outcomes(seeds=(1,)))[0].high)


def test_todays_default_stays_where_it_qualifies():
    known = outcomes()
    assert rules.level(TODAY, known) == 1
    assert rules.choose(known) == TODAY


def test_lowest_floor_that_qualifies_is_chosen():
    away = {(STALE, arm, 3): record(0.01, 12.0) for arm in ELIGIBLE[:2]}
    known = outcomes(away)
    assert [rules.level(arm, known) for arm in ELIGIBLE] == [0, 0, 1, 1]
    assert rules.choose(known) == ELIGIBLE[2]


def test_a_better_level_goes_before_a_smaller_bias():
    # Worse by more than the margin in the mean, but not with 95 % confidence: one bad seed.
    short = {(STALE, arm, 3): record(0.3, 2.0) for arm in ELIGIBLE[:3]}
    known = outcomes(short)
    assert [rules.level(arm, known) for arm in ELIGIBLE] == [2, 2, 2, 1]
    assert rules.choose(known) == ELIGIBLE[3]


def test_worse_with_confidence_reaches_no_level():
    assert rules.level(TODAY, outcomes({(STALE, TODAY, None): record(0.4, 2.0)})) == 0


def test_lost_reward_is_forgiven_where_the_unweighted_term_loses_as_much():
    held = {(STALE, arm, None): record(0.1, 0.1) for arm in LOCAL}
    known = outcomes(held)
    assert [rules.level(arm, known) for arm in ELIGIBLE] == [3, 3, 3, 3]
    kept = outcomes(held | {(STALE, UNWEIGHTED, 1): record(0.4, 0.1)})
    assert rules.level(TODAY, kept) == 0


def test_todays_default_stays_where_nothing_qualifies():
    known = outcomes({(STALE, arm, 3): record(0.01, 12.0) for arm in ELIGIBLE})
    assert rules.order(known) == []
    assert rules.choose(known) == TODAY
    said = summary.verdict(known, [], TODAY)["sentence"]
    assert "No candidate" in said


def test_second_choice_never_left_the_reference_and_lost_reward_least():
    lost = {(STALE, arm, seed): record(0.1, 0.3) for arm, seed in ((ELIGIBLE[1], None), (ELIGIBLE[2], 4))}
    lost |= {(STALE, TODAY, None): record(0.0, 12.0), (STALE, ELIGIBLE[3], 1): record(0.1, 0.3)}
    known = outcomes(lost)
    assert rules.order(known) == []
    assert rules.second_choice(known) == ELIGIBLE[2]
    assert f"By the second rule it is {ELIGIBLE[2]}." in summary.verdict(known, [], ELIGIBLE[2])["sentence"]
    everything = outcomes({(STALE, arm, 1): record(0.0, 12.0) for arm in ELIGIBLE})
    assert rules.second_choice(everything) is None


def test_second_choice_may_lose_no_more_reward_than_the_unweighted_term():
    assert rules.second_confirmed(ELIGIBLE[2], outcomes())
    lost = {(STALE, ELIGIBLE[2], 1): record(0.1, 0.3)}
    assert not rules.second_confirmed(ELIGIBLE[2], outcomes(lost))
    assert rules.second_confirmed(ELIGIBLE[2], outcomes(lost | {(STALE, UNWEIGHTED, 2): record(0.1, 0.3)}))
    assert not rules.second_confirmed(ELIGIBLE[2], outcomes({(STALE, ELIGIBLE[2], 1): record(0.5, 8.5)}))


def test_confirmation_fails_where_the_choice_runs_away_again():
    again = tuple(replace(place, family="llama") for place in (FRESH, STALE))
    chosen, good = ELIGIBLE[2], outcomes(places=again)
    bad = outcomes({(again[1], chosen, 2): record(0.01, 12.0)}, places=again)
    assert rules.confirmed(chosen, outcomes(), good)
    assert not rules.confirmed(chosen, outcomes(), bad)
    assert "FAILS" in summary.verdict(outcomes(), bad, chosen)["sentence"]
    assert "holds" in summary.verdict(outcomes(), good, chosen)["sentence"]


def test_an_arm_with_top_k_holds_if_it_never_left_and_lost_no_more_than_the_unweighted_term():
    arm = TOP_K[0]
    assert rules.top_k_holds(outcomes()) == dict.fromkeys(TOP_K, True)
    above = rules.top_k_holds(outcomes({(STALE, arm, 2): record(0.5, 8.5)}))
    assert above == {arm: False, TOP_K[1]: True, TOP_K[2]: True}
    lost = {(STALE, arm, 2): record(0.1, 0.3)}
    assert not rules.top_k_holds(outcomes(lost))[arm]
    assert rules.top_k_holds(outcomes(lost | {(STALE, UNWEIGHTED, 4): record(0.1, 0.3)}))[arm]


def test_arms_are_canonical_specs_and_candidates_have_no_cap():
    for arm in (*LOCAL, *TOP_K, *(a for a in REPORTED if not a.startswith("native"))):
        assert str(KLSpec.parse(arm)) == arm
    assert [KLSpec.parse(arm).floor for arm in ELIGIBLE] == [None, 0.2, 0.5, 1.0]
    assert {KLSpec.parse(arm).cap for arm in ELIGIBLE} == {None}


def test_plan_goes_seed_by_seed_and_confirms_what_was_never_run():
    candidates, reported = arms.selection()
    runs = planned(candidates, Options(5, Path(), 1), "code")
    assert len(runs) == 160
    assert [seed for _, _, seed in runs] == sorted(seed for _, _, seed in runs)
    assert len(planned(reported, Options(5, Path(), 1), "code")) == 48
    assert len(planned(candidates, Options(2, Path(), 1), "code")) == 64
    fast, slow = arms.confirmation(ELIGIBLE[2])
    assert Place("rare", "qwen2", 8) in fast.places
    assert {place.rate for place in slow.places} == {slow.settings.learning_rate}
    assert len(fast.arms) == 5
    assert len(arms.confirmation(TODAY)[0].arms) == 4


def test_summary_counts_and_is_plain_json():
    found = records({(STALE, TODAY, 3): record(0.01, 12.0), (STALE, TODAY, 4): record(0.1, 2.0)})
    known = rules.outcomes(found, BETA)
    data = summary.part(found, known, BETA)
    json.dumps(data, allow_nan=False)
    row = next(r for r in data["rows"] if (r["delay"], r["arm"]) == (16, TODAY))
    assert (row["ran away"], row["above"], row["lost"]) == ([3, 4], [3], [3, 4])
    assert row["excursion"] == pytest.approx(4.0)
    total = next(t for t in data["totals"] if t["arm"] == TODAY)
    assert (total["stale"]["runs"], total["all"]["runs"]) == (5, 10)
    assert total["stale"]["ran_away"] == {"count": 2, "upper": rules.upper_bound(2, 5)}
    assert summary.places_table(data, "t").row_count == 2 * (1 + len(LOCAL) + len(TOP_K))
    assert summary.totals_table(data, "t").row_count == len(LOCAL) + len(TOP_K)


def test_figure_is_drawn_from_the_json(tmp_path):
    plot = pytest.importorskip("benchmarks.study.stale.plot")
    found = records({(STALE, TODAY, 3): record(0.01, 12.0)}, seeds=(1, 2, 3))
    known = rules.outcomes(found, BETA)
    data = {"selection": summary.part(found, known, BETA), "verdict": summary.verdict(known, [], ELIGIBLE[1])}
    plot.draw(tmp_path / "stale.png", json.loads(json.dumps(data)))
    assert (tmp_path / "stale.png").stat().st_size > 10_000
