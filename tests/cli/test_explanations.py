"""What ``explain`` says, for every preset and every combination of the spec's words."""

import itertools
import re

import pytest

from kl_plugins.estimators import BUILT_IN
from kl_plugins.explain import Explanation, explain
from kl_plugins.explain.options import PLACEMENT_MEANINGS
from kl_plugins.hosts import Host
from kl_plugins.spec import PRESETS, KLSpec, KLSpecError
from kl_plugins.spec.grammar import PLACEMENTS
from kl_plugins.spec.options import OPTIONS as TABLE
from kl_plugins.spec.schedules import SCHEDULES
from kl_plugins.spec.target import TARGETS

ESTIMATORS = (*BUILT_IN, "alpha-0.5", "alpha-1", "alpha-2")
OPTIONS = (
    "",
    "/is:token",
    "/is:prefix",
    "/is:sequence/norm",
    "/is:token/cap:2/band:0.5-3/behaviour:old",
    "/is:token/floor:0.5",
    "/is:token/floor:0.2/cap:2",
    "/clip:0.2",
    "/horizon:sequence",
    "/horizon:token",
    "/horizon:sequence/is:token",
    "/horizon:sequence/is:prefix/cap:5",
    "/horizon:sequence/is:sequence",
    "/horizon:sequence/is:decision/gamma:0.9",
    "/horizon:sequence/clip:0.1",
    "/horizon:sequence/future:k3",
    "/horizon:sequence/future:exact/is:decision",
    "/future:k3",
    "/top",
    "/top:8/is:token/floor:0.5",
    "/top:8/horizon:sequence/is:decision",
    "/bound:10/beta:adaptive-0.1-1000",
    "/beta:dual-0.1-0.01",
    "/beta:linear-0.1-0-100",
)


def explained() -> list[Explanation]:
    found = []
    for estimator, placement, options in itertools.product(ESTIMATORS, PLACEMENTS, OPTIONS):
        try:
            found.append(explain(f"{estimator}@{placement}{options}"))
        except KLSpecError:  # a contradiction of the grammar, which its own tests know
            continue
    return found


def test_every_combination_is_explained_in_full() -> None:
    everything = explained()
    assert len(everything) > 300
    for it in everything:
        assert KLSpec.parse(it.spec).target == it.target, it.spec
        assert it.target in TARGETS
        assert {it.on_policy.target, it.off_policy.target} <= set(TARGETS)
        assert it.sources, it.spec
        assert it.options, it.spec
        assert bool(it.why_none) is (it.target == "none"), it.spec
        assert it.needs_allow_biased is (it.target == "none"), it.spec
        said = [*it.formulas.values(), it.on_policy.text, it.off_policy.text, *it.notes, it.why_none]
        assert not any(re.search(r"None|\{|  |\bTrue\b", text.replace("_{", "")) for text in said), said


def test_every_estimator_can_be_explained_in_every_placement() -> None:
    seen = {(it.spec.partition("@")[0], it.spec.partition("@")[2].partition("/")[0]) for it in explained()}
    expected = set(itertools.product(ESTIMATORS, PLACEMENTS)) - {("exact", "reward")}
    assert seen == expected
    with pytest.raises(KLSpecError, match="constant given the state"):
        explain("exact@reward")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_explained_and_recognised(preset: str) -> None:
    it = explain(preset)
    assert preset in it.presets
    assert it.spec == str(KLSpec.parse(PRESETS[preset]))
    assert not it.needs_allow_biased


def test_twin_presets_are_both_named() -> None:
    assert set(explain("k1@reward").presets) == {"ppo", "reinforce++"}


def test_k3_as_loss_is_the_forward_kl() -> None:
    it = explain("k3@loss")
    assert "forward KL's gradient" in it.notes[0]
    assert "KL(reference || policy)" in it.notes[0]
    assert it.on_policy.target == "forward_kl_token"
    assert "forward" not in " ".join(explain("k2@loss").notes)


def test_default_says_why() -> None:
    assert "Why this is the default" in explain("default").notes[0]
    assert "Why this is the default" in explain("k2@loss/is:token/floor:0.5").notes[0]
    assert "default" not in " ".join(explain("k2@loss").notes)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("k1@loss", r"E\[grad log policy\] = 0"),
        ("k1@loss/horizon:sequence", "only the future terms are left"),
        ("k3@reward", "reverse-KL gradient of sequences minus the token-local forward-KL gradient"),
        ("k3@advantage/horizon:token", "token-local reverse-KL gradient minus the token-local forward-KL gradient"),
        ("k2@reward", "expected sum of k2 minus the token-local reverse-KL gradient"),
        ("jsd@advantage", "value k_t stands where its coefficient belongs"),
        ("k3@loss/horizon:sequence", "gradient of neither"),
        ("k2@loss/horizon:sequence/is:token", "is:token gives it that of token t alone"),
        ("k2@loss/horizon:sequence/is:prefix", "is:prefix gives it those up to token t"),
    ],
)
def test_a_biased_spec_is_explained_without_allow(spec: str, reason: str) -> None:
    it = explain(spec)
    assert it.needs_allow_biased
    assert it.spec.endswith("/allow:biased")
    assert re.search(reason, it.why_none)
    assert not explain(it.spec).needs_allow_biased


@pytest.mark.parametrize(
    ("spec", "on_policy", "off_policy"),
    [
        ("k2@loss", "reverse_kl_token", "none"),
        ("k2@loss/is:token", "reverse_kl_token", "reverse_kl_token_behaviour"),
        ("k2@loss/is:prefix", "reverse_kl_token", "reverse_kl_token"),
        ("k2@loss/clip:0.2", "reverse_kl_token", "reverse_kl_token_behaviour"),
        ("k2@loss/horizon:sequence", "reverse_kl_sequence", "none"),
        ("k2@loss/horizon:sequence/is:token", "reverse_kl_sequence", "none"),
        ("k2@loss/horizon:sequence/is:decision", "reverse_kl_sequence", "reverse_kl_sequence"),
        ("jsd@loss/horizon:sequence", "other_f_sequence", "none"),
        ("exact@loss", "reverse_kl_token", "reverse_kl_token_behaviour"),
        ("exact@loss/top:8", "reverse_kl_token", "none"),
        ("exact@loss/top:8/is:token", "reverse_kl_token", "reverse_kl_token_behaviour"),
        ("k1@reward", "reverse_kl_sequence", "none"),
        ("k1@advantage/horizon:token", "reverse_kl_token", "none"),
        ("k2@loss/is:token/band:2-3", "none", "reverse_kl_token_behaviour"),
    ],
)
def test_bias_on_and_off_policy(spec: str, on_policy: str, off_policy: str) -> None:
    it = explain(spec)
    assert (it.on_policy.target, it.off_policy.target) == (on_policy, off_policy)


@pytest.mark.parametrize(
    ("spec", "name", "formula"),
    [
        ("k2@loss", "coefficient", "c_t = u_t;"),
        ("k3@loss/is:token/cap:2", "coefficient", "c_t = w_t (1 - delta_t);"),
        ("k3@loss/is:token/cap:2", "weight", "w_t = min(rho_t, 2);"),
        ("k2@loss/is:token/floor:0.5", "weight", "w_t = max(rho_t, 0.5);"),
        ("k2@loss/is:token/floor:0.5/cap:2", "weight", "w_t = min(max(rho_t, 0.5), 2);"),
        ("jsd@loss/is:token", "coefficient", "c_t = w_t (-log((1+delta_t)/2)/2);"),
        ("k2@loss/is:prefix/band:0.5-2/norm", "weight", "w_t = rho_{1:t}, 0 outside [0.5, 2], divided by its mean"),
        ("k2@loss/horizon:sequence/gamma:0.9", "coefficient", "c_t = u_t + sum_{j>t} 0.9^(j-t) u_j;"),
        ("k2@loss/horizon:sequence/is:sequence", "coefficient", "c_t = w_t (u_t + sum_{j>t} u_j);"),
        ("k2@loss/horizon:sequence/is:decision", "coefficient", "c_t = w_t u_t + sum_{j>t} w_j u_j;"),
        ("k2@loss/horizon:sequence/is:decision/future:exact", "weight", "the same with rho_{1:j-1}"),
        ("exact@loss/is:prefix", "weight", "w_t = rho_{1:t-1};"),
        ("exact@loss", "coefficient", "c_t = 0;"),
        ("exact@loss/top:8", "coefficient", "c_t = v_t;"),
        ("exact@loss/top:8/is:token/floor:0.5", "coefficient", "c_t = w_t v_t;"),
        ("exact@loss/top:8/is:token/floor:0.5", "weight", "w_t = max(rho_t, 0.5); detached"),
        ("exact@loss/top:8/is:token/floor:0.5", "own term", "grad k_t, differentiated over the set S and the bucket"),
        ("exact@loss/top:8/is:prefix", "weight", "w'_t of set and bucket is the same with rho_{1:t-1}"),
        ("exact@loss/top:8/is:prefix", "own term", "w'_t grad k_t"),
        ("exact@loss/top:8/is:sequence", "own term", "w_t grad k_t"),
        (
            "exact@loss/horizon:sequence/top:8/is:decision",
            "coefficient",
            "c_t = w_t v_t + sum_{j>t} (w'_j k_j + w_j v_j)",
        ),
        ("exact@advantage/top:8", "penalty", "p_t = u_t + sum_{j>t} (k_j + v_j)"),
        ("k2@loss/clip:0.2", "clipped head", "max(rho_t k'_t, clip(rho_t, 0.8, 1.2) k'_t) with k'_t = u_t"),
        ("alpha-0.5@loss", "coefficient", "c_t = (1 - delta_t^0.5)/0.5;"),
        ("k1@advantage", "penalty", "p_t = u_t + sum_{j>t} u_j,"),
        ("k1@advantage/future:k3", "penalty", "p_t = u_t + sum_{j>t} (delta_j - 1 + u_j),"),
        ("k1@reward", "penalty", "p_t = k_t,"),
    ],
)
def test_formulas_are_those_of_the_kernels(spec: str, name: str, formula: str) -> None:
    assert formula in explain(spec).formulas[name]


KEEP, LOSE = ("k3", "jeffreys", "chi2", "alpha-1", "alpha-2"), ("k2", "k3+", "abs", "jsd", "hellinger", "alpha-0.5")


@pytest.mark.parametrize("estimator", KEEP + LOSE)
def test_says_which_estimators_keep_their_pull_under_the_exact_weight(estimator: str) -> None:
    """That the rows are right is shown by their own coefficients, in tests/oracle/test_floor.py."""
    for level in ("token", "prefix", "sequence"):
        said = " ".join(explain(f"{estimator}@loss/is:{level}").notes)
        assert ("grows at least like 1/p" in said) is (estimator in KEEP)
        assert ("this can run away" in said) is (estimator in LOSE)
        assert ("floor:<c> keeps the pull" in said) is (estimator in LOSE and level == "token")
    floored = " ".join(explain(f"{estimator}@loss/is:token/floor:0.5").notes)
    assert "the weight stays at 0.5" in floored
    assert "run away" not in floored
    assert "does not fade" in " ".join(explain(f"{estimator}@loss").notes)


def test_what_else_there_is_to_say_of_the_pull() -> None:
    assert "left out by the band" in " ".join(explain("k3@loss/is:token/band:0.5-2").notes)
    assert "left out by the band" not in " ".join(explain("k3@loss/is:token/band:0-2").notes)
    assert "this can run away" in " ".join(explain("k2@loss/clip:0.2").notes)
    assert "away. jeffreys, chi2" in " ".join(explain("sequence").notes)
    assert "away. k3, jeffreys" in " ".join(explain("k2@loss/is:prefix").notes)
    assert "no noise of sampled tokens" in " ".join(explain("exact@loss").notes)
    for text in ("k1@loss/is:token", "k1@reward", "k1@advantage"):
        assert "fade" not in " ".join(explain(text).notes)


def test_a_floor_is_said_to_bend_the_estimate_off_policy_alone() -> None:
    it = explain("k2@loss/is:token/floor:0.5")
    assert it.target == it.off_policy.target == "reverse_kl_token_behaviour"
    assert it.off_policy.text.startswith("Biased")
    assert "floor bends it" in it.off_policy.text
    assert it.on_policy.text.startswith("Unbiased")
    assert any("E_behaviour[(0.5 - w)+ c(u) grad log policy]" in caveat for caveat in it.caveats)


def test_symbols_are_explained_where_they_are_used() -> None:
    assert "rho" not in explain("k2@loss").formulas["symbols"]
    assert "policy/sampler" in explain("k2@loss/is:token/behaviour:sampler").formulas["symbols"]


def test_options_say_which_are_defaults() -> None:
    options = {option.name: option for option in explain("k2@loss/is:token/cap:2").options}
    assert not options["cap"].default
    assert options["cap"].value == "2"
    assert options["bound"].default
    assert options["behaviour"].value == "automatic"
    assert "clip" not in options
    assert "gamma" not in options


def test_where_it_goes_is_the_hosts_own_word() -> None:
    host = Host("there", "there", ("there",), ">=1", ("1.0",), {"loss": "trainer.kl"}, "there.adapter")
    assert explain("k2@loss", [host]).hosts == {"there": "trainer.kl"}
    assert "no place" in explain("k1@reward", [host]).hosts["there"]


def test_every_word_of_the_grammar_has_a_meaning() -> None:
    assert set(PLACEMENT_MEANINGS) == set(PLACEMENTS)
    assert {example[2].kind for example in TABLE["beta"].values.examples} == set(SCHEDULES)
    for row in TABLE.values():
        assert row.meaning, row.name
        assert row.values.examples, row.name
        assert set(row.values.meanings) <= {canonical for canonical, _, _ in row.values.examples}, row.name
        for canonical, other, value in row.values.examples:
            assert row.values.effect(value), (row.name, canonical)
            assert row.values.write(value) == canonical, row.name
            assert row.values.read(canonical) == row.values.read(other) == value, row.name


@pytest.mark.parametrize(
    ("name", "value"), [(row.name, example[0]) for row in TABLE.values() for example in row.values.examples]
)
def test_every_value_of_every_option_is_explained_somewhere(name: str, value: str) -> None:
    option, spoken = f"/{name}:{value}" if value else f"/{name}", []
    for estimator, placement, others in itertools.product(("k2", "jsd", "exact", "k1"), PLACEMENTS, OPTIONS):
        try:
            it = explain(f"{estimator}@{placement}{others}{option}")
        except KLSpecError:
            continue
        spoken += [shown for shown in it.options if (shown.name, shown.value) == (name, value)]
    assert spoken, f"no spec was found that takes {option}"
    assert all(shown.meaning for shown in spoken)
