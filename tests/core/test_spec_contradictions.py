"""Every contradiction of the grammar is refused, at the part that is too much, with its reason."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from kl_plugins import KLSpec, KLSpecError
from tests.support.core.specs import F_DIVERGENCES, Combination, combinations, default_future, default_horizon

WHOLE = ""

CASES = [
    # (spec, the part that the error points at, words of the reason)
    ("k2@reward/is:token/allow:biased", "is:token", "@reward"),
    ("k1@reward/is:none", "is:none", "@reward"),
    ("k1@reward/behaviour:old", "behaviour:old", "@reward"),
    ("k1@reward/cap:2", "cap:2", "@reward"),
    ("k1@reward/band:0.5-2", "band:0.5-2", "@reward"),
    ("k1@reward/norm", "norm", "@reward"),
    ("k1@reward/clip:0.2", "clip:0.2", "@reward"),
    ("k1@advantage/is:prefix", "is:prefix", "@advantage"),
    ("k1@advantage/behaviour:sampler", "behaviour:sampler", "@advantage"),
    ("k1@advantage/cap:2", "cap:2", "@advantage"),
    ("k1@advantage/band:0-2", "band:0-2", "@advantage"),
    ("k1@advantage/norm", "norm", "@advantage"),
    ("k1@advantage/clip:0.2", "clip:0.2", "@advantage"),
    ("k1@reward/horizon:token", "horizon:token", "@reward"),
    ("k1@reward/horizon:sequence", "horizon:sequence", "@reward"),
    ("k1@reward/future:k1", "future:k1", "@reward"),
    ("k1@reward/gamma:0.9", "gamma:0.9", "@reward"),
    ("k2@loss/top:20", "top:20", "exact"),
    ("k1@advantage/future:exact/top:20", "top:20", "exact"),
    ("exact@loss/draws:8", "draws:8", "outside those of top:"),
    ("k2@loss/draws:8", "draws:8", "outside those of top:"),
    ("exact@reward", WHOLE, "regularises nothing"),
    ("exact@advantage/horizon:token", "horizon:token", "exact"),
    ("exact@advantage/future:k1", "future:k1", "exact"),
    ("exact@loss/is:token", "is:token", "token weight"),
    ("exact@loss/horizon:sequence/is:token", "is:token", "token weight"),
    ("exact@loss/clip:0.2", "clip:0.2", "no score coefficient"),
    ("k2@loss/future:k1", "future:k1", "horizon:token"),
    ("k2@loss/horizon:token/future:k3", "future:k3", "horizon:token"),
    ("k2@loss/gamma:0.9", "gamma:0.9", "horizon:token"),
    ("k2@loss/gamma:1", "gamma:1", "horizon:token"),
    ("k1@advantage/horizon:token/gamma:0.9", "gamma:0.9", "horizon:token"),
    ("k1@advantage/horizon:token/future:k1", "future:k1", "horizon:token"),
    ("k2@loss/is:decision", "is:decision", "future"),
    ("k2@loss/horizon:sequence/future:own", "future:own", "f-divergences"),
    ("abs@loss/horizon:sequence/future:own", "future:own", "f-divergences"),
    ("jsd@loss/horizon:sequence/future:k1", "future:k1", "f(delta_j)"),
    ("alpha-0.5@loss/horizon:sequence/future:exact", "future:exact", "f(delta_j)"),
    ("k2@loss/clip:0.2/is:token", "is:token", "clip"),
    ("k2@loss/clip:0.2/is:none", "is:none", "clip"),
    ("k2@loss/clip:0.2/cap:2", "cap:2", "clip"),
    ("k2@loss/clip:0.2/band:0-2", "band:0-2", "clip"),
    ("k2@loss/clip:0.2/norm", "norm", "clip"),
    ("k2@loss/is:token/clip:0.2/floor:0.5", "is:token", "clip"),
    ("k2@loss/clip:0.2/floor:0.5", "floor:0.5", "clip"),
    ("k2@loss/floor:0.5", "floor:0.5", "importance weight"),
    ("k2@loss/is:none/floor:0.5", "floor:0.5", "importance weight"),
    ("k2@loss/is:prefix/floor:0.5", "floor:0.5", "product of weights"),
    ("k2@loss/horizon:sequence/is:sequence/floor:0.5", "floor:0.5", "later tokens"),
    ("k2@loss/horizon:sequence/is:decision/floor:0.5", "floor:0.5", "later tokens"),
    ("k2@loss/horizon:sequence/is:token/floor:0.5/allow:biased", "floor:0.5", "later tokens"),
    ("k2@loss/is:token/floor:0.5/band:0.2-2", "floor:0.5", "band drops"),
    ("k2@loss/is:token/floor:0.5/norm", "floor:0.5", "norm divides"),
    ("k2@loss/is:token/floor:0.5/cap:0.2", "floor:0.5", "cap 0.2 is below"),
    ("k1@loss/is:token/floor:0.5/allow:biased", "floor:0.5", "sign of u"),
    ("exact@loss/floor:0.5", "floor:0.5", "weight of its own token"),
    ("exact@loss/top:8/floor:0.5", "floor:0.5", "importance weight"),
    ("exact@loss/top:8/is:prefix/floor:0.5", "floor:0.5", "product of weights"),
    ("exact@loss/top:8/is:token/floor:0.5/norm", "floor:0.5", "norm divides"),
    ("exact@loss/top:8/horizon:sequence/is:token", WHOLE, "no divergence"),
    ("exact@loss/top:8/clip:0.2", "clip:0.2", "no score coefficient"),
    ("exact@loss/is:prefix/floor:0.5", "floor:0.5", "weight of its own token"),
    ("k1@advantage/floor:0.5", "floor:0.5", "@advantage"),
    ("k1@reward/floor:0.5", "floor:0.5", "@reward"),
    ("k2@loss/cap:2", "cap:2", "importance weight"),
    ("k2@loss/is:none/cap:2", "cap:2", "importance weight"),
    ("k2@loss/band:0-2", "band:0-2", "importance weight"),
    ("k2@loss/norm", "norm", "importance weight"),
    ("k2@loss/behaviour:old", "behaviour:old", "importance weight"),
    # Wrong by theory: only with allow:biased.
    ("k1@loss", WHOLE, "no divergence"),
    ("k1@loss/is:token", WHOLE, "no divergence"),
    ("k2@reward", WHOLE, "no divergence"),
    ("k3@reward", WHOLE, "no divergence"),
    ("k3+@advantage", WHOLE, "no divergence"),
    ("abs@reward", WHOLE, "no divergence"),
    ("jsd@advantage", WHOLE, "no divergence"),
    ("k2@advantage/horizon:token", WHOLE, "no divergence"),
    ("k3@loss/horizon:sequence", WHOLE, "no divergence"),
    ("abs@loss/horizon:sequence", WHOLE, "no divergence"),
    ("k2@loss/horizon:sequence/is:token", WHOLE, "no divergence"),
    ("k2@loss/horizon:sequence/is:prefix", WHOLE, "no divergence"),
    ("jsd@loss/horizon:sequence/is:prefix", WHOLE, "no divergence"),
    ("k2@loss/horizon:sequence/clip:0.2", WHOLE, "no divergence"),
    # And nowhere else.
    ("k2@loss/allow:biased", "allow:biased", "reverse_kl_token"),
    ("k1@reward/allow:biased", "allow:biased", "reverse_kl_sequence"),
    ("exact@advantage/allow:biased", "allow:biased", "reverse_kl_sequence"),
    ("jsd@loss/horizon:sequence/allow:biased", "allow:biased", "other_f_sequence"),
]


@pytest.mark.parametrize(("text", "part", "reason"), CASES, ids=[text for text, _, _ in CASES])
def test_contradiction(text: str, part: str, reason: str) -> None:
    with pytest.raises(KLSpecError) as caught:
        KLSpec.parse(text)
    error = caught.value
    assert error.text == text
    assert error.text[error.start : error.end] == (part or text)
    assert reason in error.problem
    assert error.expected


@pytest.mark.parametrize(
    ("text", "part", "reason"), [case for case in CASES if case[1] == WHOLE and "reward" not in case[0]]
)
def test_allow_biased_lets_what_is_wrong_by_theory_through(text: str, part: str, reason: str) -> None:
    spec = KLSpec.parse(f"{text}/allow:biased")
    assert spec.target == "none"
    assert spec.allow_biased


def test_a_part_that_contradicts_is_refused_with_allow_biased_too() -> None:
    with pytest.raises(KLSpecError, match="regularises nothing"):
        KLSpec.parse("exact@reward/allow:biased")


WEIGHT_TREATMENT = {"floor", "cap", "band", "norm"}


def is_refused(it: Combination) -> bool:
    """Whether the design says that these parts contradict each other; independent of the table of options."""
    estimator, placement, written = it.estimator, it.placement, set(it.options)
    horizon = it.value("horizon", default_horizon(placement))
    future = it.value("future", default_future(estimator, horizon))
    correction, clipped = it.value("is", "none"), "clip" in written
    if placement != "loss" and written & {"is", "behaviour", "clip", *WEIGHT_TREATMENT}:
        return True
    if placement == "reward" and (estimator == "exact" or written & {"horizon", "future", "gamma"}):
        return True
    if estimator == "exact":
        if placement == "advantage" and future != "exact":
            return True
        if clipped or (correction == "token" and "top" not in written):
            return True
    elif "top" in written:
        return True
    if "draws" in written and "top" not in written:
        return True
    if horizon == "token" and (written & {"future", "gamma"} or correction == "decision"):
        return True
    if horizon == "sequence" and (future == "own") is not (estimator in F_DIVERGENCES):
        return True
    if "floor" in written and estimator == "exact" and "top" not in written:
        return True
    if "floor" in written:
        if horizon != "token" or correction != "token" or estimator == "k1" or written & {"band", "norm"}:
            return True
        if it.value("cap", 1.0) < it.value("floor"):
            return True
    if clipped:
        return bool(written & {"is", *WEIGHT_TREATMENT})
    return correction == "none" and bool(written & {"behaviour", *WEIGHT_TREATMENT})


@settings(max_examples=1000)
@given(combinations())
def test_the_table_refuses_what_the_design_refuses_and_no_more(it: Combination) -> None:
    if not is_refused(it):
        KLSpec.parse(it.text)
        return
    with pytest.raises(KLSpecError) as caught:
        KLSpec.parse(it.text)
    part = caught.value.text[caught.value.start : caught.value.end]
    assert part == it.text or part.partition(":")[0] in it.options
