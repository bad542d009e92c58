"""What the report sees in a series: pure functions on series made by hand."""

import math
import random

import pytest

from kl_plugins.report import facts
from kl_plugins.report.series import Series, median, series_of, smoothed, thinned
from tests.support.report.logs_of_runs import series

NAN = math.nan


def test_a_condition_that_begins_and_stays_lasts_from_its_first_step() -> None:
    fact = facts.above(series(*[0.1] * 339, *[0.6] * 200), 0.5)
    assert fact is not None
    assert (fact.first, fact.lasting, fact.always, fact.count) == (340, True, False, 200)
    assert fact.when() == "From step 340 on"
    assert fact.value == pytest.approx(0.6)


def test_one_step_in_ten_may_miss_and_not_more() -> None:
    tail = [0.6] * 9 + [0.1] + [0.6] * 10
    fact = facts.above(series(*[0.1] * 80, *tail), 0.5)
    assert fact is not None
    assert fact.lasting
    assert fact.first == 81
    often = facts.above(series(*[0.1] * 80, *[0.1, 0.6] * 10), 0.5)
    assert often is not None
    assert not often.lasting
    assert often.when() == "In 10 of 100 logged steps, between step 82 and step 100"


def test_a_rare_condition_that_does_not_last_is_not_reported() -> None:
    assert facts.above(series(*[0.1] * 50, *[0.6] * 9, *[0.1] * 41), 0.5) is None
    assert facts.above(series(0.1, 0.6, 0.1, 0.1), 0.5) is None  # a single step, although it is a quarter of all


def test_the_last_steps_alone_do_not_last() -> None:
    assert facts.above(series(*[0.1] * 98, 0.6, 0.6), 0.5) is None
    fact = facts.above(series(*[0.1] * 97, 0.6, 0.6, 0.6), 0.5)
    assert fact is not None
    assert fact.first == 98


def test_the_beginning_of_a_sentence_says_when() -> None:
    assert facts.above(series(1, 1, 1), 0.5).when() == "In every logged step"
    assert facts.above(series(1), 0.5).when() == "In step 1"
    assert facts.above(series(*[1] * 10, 0, *[1] * 10), 0.5).when() == "From the first logged step on"
    assert facts.not_finite(series(0, NAN, 0)).when() == "In step 2"


def test_limits_are_strict_where_the_words_say_above_and_below() -> None:
    assert facts.above(series(0.5, 0.5, 0.5), 0.5) is None
    assert facts.below(series(0.8, 0.8, 0.8), 0.8) is None
    assert facts.below(series(0.79, 0.79, 0.79), 0.8) is not None
    assert facts.ever_at_least(series(0, 30.0, 0), 30.0) is not None
    assert facts.ever_below(series(0, -1e-6, 0), -1e-6) is None


def test_values_that_are_not_finite_are_seen_and_hide_nothing_else() -> None:
    fact = facts.not_finite(series(0, math.inf, NAN, 0))
    assert fact is not None
    assert (fact.first, fact.last, fact.count, fact.total) == (2, 3, 2, 4)
    assert facts.not_finite(series(0, 1)) is None
    assert facts.above(series(0.6, NAN, 0.6, 0.6), 0.5).when() == "In every logged step"


def test_distance_from_one_counts_in_both_directions() -> None:
    assert facts.off_one(series(1.2, 0.8, 1.2), 0.1) is not None
    assert facts.off_one(series(1.05, 0.95, 1.05), 0.1) is None


def test_the_first_step_is_judged_only_if_it_is_in_the_log() -> None:
    assert facts.off_at_start(series(0.5, 0.0), 0.01).value == 0.5
    assert facts.off_at_start(series(-0.5, 0.0), 0.01) is not None  # k1 can be negative
    assert facts.off_at_start(series(0.5, 0.0, first=10), 0.01) is None
    assert facts.off_at_start(series(0.0, 0.5), 0.01) is None


def test_zeros() -> None:
    assert facts.always_zero(series(0, 0, 0)) is not None
    assert facts.always_zero(series(0, 0)) is None
    assert facts.always_zero(series(0, 0, 1e-9)) is None
    assert facts.zeros(series(*[1.0] * 5, *[0.0] * 5)).first == 6


def test_a_rise_at_the_end_is_told_from_a_rise_that_levels_off() -> None:
    levelled = series(*(1 - math.exp(-step / 10) for step in range(100)))
    assert facts.rising(levelled, 2.0) is None
    plateau = series(*[0.1] * 60, *(0.1 + 0.02 * i for i in range(40)))
    fact = facts.rising(plateau, 2.0)
    assert fact is not None
    assert 58 <= fact.first <= 64
    assert fact.before == pytest.approx(0.1)
    assert fact.value == pytest.approx(0.79, abs=0.05)
    assert facts.rising(series(*(0.01 * i for i in range(100))), 2.0) is not None
    assert facts.rising(series(*[0.1] * 50, *[9.0], *[0.1] * 49), 2.0) is None  # a spike is no rise
    assert facts.rising(series(*[0.1] * 4, *[9.0] * 5), 2.0) is None  # too short


def test_spikes_are_rare_values_far_above_the_usual_ones() -> None:
    fact = facts.spikes(series(*[0.1] * 50, 2.0, *[0.1] * 30, 5.0, *[0.1] * 18), 10.0)
    assert fact is not None
    assert (fact.first, fact.last, fact.count) == (51, 82, 2)
    assert (fact.value, fact.before) == (5.0, 0.1)
    assert facts.spikes(series(*[0.1] * 50, 0.9, *[0.1] * 49), 10.0) is None
    assert facts.spikes(series(*[0.1] * 80, *[2.0] * 20), 10.0) is None  # a new level is no spike
    assert facts.spikes(series(*[0.0] * 50, 1.0, *[0.0] * 49), 10.0) is None  # there is no usual value


def test_a_fallen_reward_is_told_from_noise() -> None:
    up = [i / 50 for i in range(50)]
    fact = facts.fallen(series(*up, *[0.2] * 50), 0.5)
    assert fact is not None
    assert fact.before > 0.9
    assert fact.value == pytest.approx(0.2)
    assert facts.fallen(series(*up, *[0.9] * 50), 0.5) is None
    assert facts.fallen(series(*(0.5 + 0.1 * (-1) ** i for i in range(100))), 0.5) is None
    chance = random.Random(0)
    for _ in range(20):
        assert facts.fallen(series(*(chance.gauss(0.5, 0.1) for _ in range(100))), 0.5) is None
    assert facts.fallen(series(*(1.0 - i / 50 for i in range(50))), 0.5).first <= 2  # it falls from the start on


def test_a_value_that_stays_at_the_end_of_its_range_is_stuck() -> None:
    fact = facts.stuck(series(*(0.1 * i for i in range(1, 11)), *[1.0] * 10), 0.1)
    assert fact is not None
    assert fact.first == 10
    assert facts.stuck(series(*[0.1] * 20), 0.1) is None  # it never moved
    assert facts.stuck(series(*(0.1 * i for i in range(20))), 0.1) is None  # it still moves
    assert facts.stuck(series(0.1, 0.5, 0.9, *[0.5] * 17), 0.1) is None  # it stays in the middle


def test_an_empty_series_shows_nothing() -> None:
    empty = Series((), ())
    looks = (facts.not_finite, facts.ever_below, facts.ever_at_least, facts.above, facts.below, facts.zeros)
    looks += (
        facts.off_one,
        facts.off_at_start,
        facts.always_zero,
        facts.rising,
        facts.fallen,
        facts.stuck,
        facts.spikes,
    )
    assert all(look(empty, 0.5) is None for look in looks)


def test_thinning_keeps_every_spike_and_every_gap() -> None:
    values = [0.0] * 10_000
    values[1234], values[7777], values[5000] = 5.0, -5.0, NAN
    kept = thinned(series(*values), 200)
    assert len(kept) <= 200
    assert {5.0, -5.0} <= set(kept.values)
    assert any(math.isnan(value) for value in kept.values)
    assert list(kept.steps) == sorted(kept.steps)
    assert thinned(series(1, 2, 3), 200) == series(1, 2, 3)


def test_small_functions() -> None:
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([4.0, 1.0, 2.0, 3.0]) == 2.5
    assert smoothed([0.0, 9.0, 0.0, 0.0]) == [0.0, 0.0, 0.0, 0.0]
    assert smoothed([5.0]) == [5.0]
    assert series_of({3: 1.0, 1: 2.0}) == Series((1, 3), (2.0, 1.0))
    assert series(1, NAN, 3).finite() == Series((1, 3), (1.0, 3.0))
