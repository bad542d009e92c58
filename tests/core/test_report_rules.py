"""Every rule of the report: a log that breaks it, a log that does not, and the words."""

import math
from pathlib import Path

import pytest

from kl_plugins.adapters.metrics import MANY
from kl_plugins.controllers import LARGEST_BETA
from kl_plugins.metric_names import AGE, MEANINGS, OBSERVATION
from kl_plugins.report.findings import NOT_ACTIVE, Finding, find
from kl_plugins.report.native import HostLogs, NativeMetric
from kl_plugins.report.rules import LEVELS, MOST_FLOORED, RULES
from kl_plugins.report.run import make_run, meaning, unit

NAN = math.nan
RISE = [0.1] * 60 + [0.1 + 0.05 * i for i in range(40)]
FALL = [i / 50 for i in range(50)] + [0.1] * 50
MOVED = [0.1 * i for i in range(1, 11)]

CASES: dict[str, tuple[str, list[float], list[float], str]] = {
    "not-finite": ("loss", [1.0, NAN, 1.0], [1.0, 1.0, 1.0], "In step 2, loss is not a finite number."),
    "inactive": ("kl/active", [1.0, 0.5, 1.0], [1.0, 1.0, 1.0], "In step 2, a part of the micro-batches was computed"),
    "negative-kl": ("kl/value", [0.0, -0.01, 0.0], [0.0, -5e-4, 0.0], "In step 2, kl/value is negative (-0.01)"),
    "negative-k1": ("kl/reverse_k1", [-0.1] * 5, [-0.1, 0.1, 0.1, 0.1], "In every logged step, the mean of k1 is neg"),
    "kl-at-start": ("kl/value", [0.5, 0.5], [0.001, 0.5], "In step 1, kl/value is 0.5 already."),
    "kl-rising": ("kl/value", RISE, [0.1] * 100, "kl/value rises after step 6"),
    "kl-spikes": ("kl/value", [0.1] * 50 + [3.0] + [0.1] * 49, [0.1] * 100, "In step 51, kl/value spikes to as much"),
    "native-kl-zero": ("kl", [0.0] * 5, [0.0, 0.0, 0.1, 0.1], "In every logged step, kl is exactly 0."),
    "weights-below-floor": (
        "kl/floor_frac", [0.1] * 339 + [0.6] * 100, [0.5] * 100, "From step 340 on, half of all weights or more are"
    ),
    "low-ess": ("kl/ess", [1.0] * 10 + [0.5] * 10, [0.8] * 20, "From step 11 on, the weights' effective sample size"),
    "weight-mean": ("kl/weight/mean", [1.0] * 10 + [0.7] * 10, [1.05] * 20, "From step 11 on, the mean weight is 0.7"),
    "large-weight": ("kl/weight/max", [50.0] * 5, [20.0] * 5, "In every logged step, single tokens have very large"),
    "dead": ("kl/dead_frac", [0.2] * 5, [0.0] * 5, "In every logged step, a share of 0.2 of all tokens has no"),
    "capped": ("kl/cap_frac", [0.3] * 5, [0.1] * 5, "In every logged step, cap, band or clip change the weight"),
    "estimators-disagree": ("kl/disagree", [2.0] * 5, [0.9] * 5, "In every logged step, the means of k1 and k3 differ"),
    "spread-coefficient": ("kl/coef/std", [9.0] * 5, [1.0] * 5, "In every logged step, the coefficients of the tokens"),
    "beyond-bound": ("kl/log_ratio/max", [1.0, 31.0, 1.0], [29.0] * 3, "In step 2, a token's log-ratio reached 31"),
    "observed": ("kl/observed", [1.0] * 5, [], "In every logged step, the spec was measured and not applied"),
    "observed-partly": ("kl/observed", [1.0, 0.5, 1.0], [1.0] * 5, "In step 2, the observed spec could not be"),
    "host-clamped": ("kl/probe/host/dead_frac", [0.1] * 5, [0.0] * 5, "In every logged step, the framework's own KL"),
    "beta-limit": ("kl/beta", [1.0, LARGEST_BETA, 1.0], [1.0] * 3, "In step 2, beta is at its largest value (1e+06)"),
    "beta-stuck": ("kl/beta", MOVED + [1.0] * 9, MOVED, "From step 10 on, beta stays at 1, the end of the range"),
    "beta-zero": ("kl/beta", [0.1] * 5 + [0.0] * 5, [0.1] * 10, "From step 6 on, beta is 0, so the KL has no effect."),
    "reward-fallen": ("reward", FALL, [i / 100 for i in range(100)], "reward has fallen since step 4"),
}  # fmt: skip
"""Metric, values that break the rule, values that do not, and the beginning of the finding."""


def findings_of(**columns: list[float]) -> list[Finding]:
    points = {key: dict(enumerate(values, start=1)) for key, values in columns.items()}
    return find([make_run("run", Path("log.jsonl"), "JSON lines", points, (), ())])


def test_every_rule_has_a_case() -> None:
    assert CASES.keys() == {rule.name for rule in RULES}
    assert len(RULES) == len(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_log_that_breaks_a_rule_is_found_and_another_is_not(name: str) -> None:
    key, broken, sound, words = CASES[name]
    (found,) = (finding for finding in findings_of(**{key: broken}) if finding.rule == name)
    assert found.text.startswith(words)
    assert found.key == key
    assert found.level == next(rule.level for rule in RULES if rule.name == name)
    assert not [finding for finding in findings_of(**{key: sound}) if finding.rule == name]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_rules_are_complete(rule) -> None:
    assert rule.level in LEVELS
    assert all((rule.condition, rule.remedy, rule.source))
    keys = [key for key in rule.metrics if key.startswith("kl/")]
    assert all(meaning(key) for key in keys)
    # A reader has to see which metric a sentence is about.
    assert "{key}" in rule.says or keys == ["kl/beta"]


def test_the_line_in_the_log_and_the_report_use_one_limit() -> None:
    assert MOST_FLOORED == MANY


def test_many_broken_metrics_are_one_finding_about_the_first_step() -> None:
    late, early = [1.0, 1.0, NAN], [1.0, NAN, NAN]
    found = findings_of(**{"kl/value": late, "kl/ess": late, "loss": early, "a": late, "b": late, "c": late})
    (finding,) = (each for each in found if each.rule == "not-finite")
    assert finding.text.startswith("First in step 2, these metrics are not finite numbers: loss, ")
    assert finding.text.endswith("and 2 more.")


def test_serious_findings_come_first() -> None:
    found = findings_of(**{"kl/disagree": [2.0] * 5, "kl/ess": [0.1] * 5, "loss": [NAN] * 5})
    assert [finding.level for finding in found] == ["error", "warning", "note"]


def test_the_frameworks_own_kl_is_judged_only_without_ours() -> None:
    native = [0.5] * 5
    assert "kl-at-start" in {finding.rule for finding in findings_of(kl=native)}
    assert "kl-at-start" not in {finding.rule for finding in findings_of(**{"kl": native, "kl/value": [0.0] * 5})}


def test_a_log_without_our_metrics_says_what_its_kl_is() -> None:
    host = HostLogs("Theirs", ("their/",), (NativeMetric("their/kl", "kl", "is a mean of k9"),))
    points = {"their/kl": {1: 0.0, 2: 0.1}}
    (found,) = find([make_run("run", Path("x"), "JSON lines", points, (), (host,))])
    assert found.rule == NOT_ACTIVE
    assert "kl-plugins was not active" in found.text
    assert "Theirs's their/kl is a mean of k9." in found.text
    (unknown,) = findings_of(kl=[0.0, 0.1])
    assert "does not know which program wrote this log" in unknown.text
    (nothing,) = findings_of(loss=[0.0, 0.1])
    assert "no metric that this page knows as a KL" in nothing.text


def test_a_sound_run_has_no_findings() -> None:
    assert not findings_of(**{"kl/value": [0.0, 0.01, 0.02], "kl/ess": [1.0, 0.95, 0.97], "kl/active": [1.0] * 3})


@pytest.mark.parametrize("key", [*MEANINGS, *AGE, *OBSERVATION, "kl/beta"])
def test_every_metric_has_a_meaning_and_its_unit_follows_from_it(key: str) -> None:
    assert meaning(key)
    assert (unit(key) == "nats") == ("nats" in meaning(key) and key != "kl/disagree")
    assert unit(key) == "share" or not key.endswith("_frac")
