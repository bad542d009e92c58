"""Every rule about configs finds what it is about and nothing else; see ``tests/support/configs.py``."""

from __future__ import annotations

import pytest

from kl_plugins.adapters.explained.common import COMMON
from kl_plugins.adapters.explained.rules import ALL_HOSTS
from tests.support.configs import ROWS, Row, explained, found, hosts, rules

# Findings that come from the reading and from refusals, and have no row in a table of rules.
WITHOUT_A_TABLE = {"reading", "refused"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.rule}-{row.host}")
def test_a_rule_finds_its_configs_and_no_others(row: Row) -> None:
    finding = found(row.host, row.hit, row.version).get(row.rule)
    assert finding is not None, f"{row.rule} does not find: {row.hit}"
    assert finding.statement
    assert finding.source
    for words in row.misses:
        assert row.rule not in found(row.host, words, row.version), words


def test_every_rule_has_a_row() -> None:
    wanted = {rule.id for host in hosts() for rule in [*rules(host), *COMMON]}
    assert {row.rule for row in ROWS} == wanted | WITHOUT_A_TABLE
    assert {row.rule for row in ROWS if row.misses} == wanted - {"version-not-checked"} | WITHOUT_A_TABLE


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.version and row.rule != "version-not-checked"], ids=lambda row: row.rule
)
def test_a_rule_about_some_versions_says_nothing_about_others(row: Row) -> None:
    (rule,) = [rule for rule in [*rules(row.host), *COMMON] if rule.id == row.rule]
    assert rule.versions
    outside = "0.1" if "<" not in rule.versions else "99.0"
    assert row.rule not in found(row.host, row.hit, outside)


def test_a_version_that_was_not_checked_is_named() -> None:
    assert "version-not-checked" not in found("trl", "beta=0.1")
    assert "0.20.0" in found("trl", "beta=0.1", "0.20.0")["version-not-checked"].statement


@pytest.mark.parametrize(
    ("host", "words", "ignored"),
    [
        ("trl", "use_bias_correction_kl=True", "use_bias_correction_kl"),
        ("trl", "beta=0.1 kl_coef=0.2", "kl_coef"),
        ("verl", "actor_rollout_ref.actor.kl_loss_type=mse", "kl_loss_type"),
        ("verl", "algorithm.kl_ctrl.type=adaptive", "kl_ctrl.type"),
        ("openrlhf", "--algo.kl.unbiased_gradient", "unbiased_gradient"),
        ("openrlhf", "--algo.kl.init_coef 0 --algo.kl.use_loss", "use_loss"),
    ],
)
def test_settings_without_effect_are_listed(host: str, words: str, ignored: str) -> None:
    assert ignored in explained(host, words).statements["no effect"]
    assert "no effect" not in explained(host, "beta=0.1" if host == "trl" else "a=1").statements


def test_rules_are_named_once_and_say_where_they_can_be_checked() -> None:
    for host in hosts():
        every = [*rules(host), *COMMON]
        assert len({rule.id for rule in every}) == len(every)
        assert all(set(rule.hosts) <= set(ALL_HOSTS) and rule.source for rule in every)
        assert all(rule.remedy or rule.severity == "note" for rule in every)
