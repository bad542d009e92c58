"""How much each token counts in a host's loss: numbers by hand, and the factors that ``benchmarks.hosts`` measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kl_plugins.adapters.aggregations import RULES, Rule, strength, token_weights
from kl_plugins.adapters.trl.explained.defaults import RULES as TRL
from kl_plugins.adapters.verl.explained.defaults import RULES as VERL
from kl_plugins.aggregation import MEANINGS

MEASURED = Path(__file__).resolve().parents[2] / "docs" / "data" / "hosts" / "native.json"
LENGTHS, WIDTH = [1, 3], 4


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ("batch", [1 / 4, 1 / 4]),
        ("response", [1 / 2, 1 / 6]),
        ("responses", [1 / 2, 1 / 2]),
        ("constant", [1 / 8, 1 / 8]),
        ("micro-batch", [1 / 2, 1 / 6]),
        ("longest", [1 / 2, 1 / 6]),
    ],
)
def test_weights_by_hand(rule: Rule, wanted: list[float]) -> None:
    assert token_weights(rule, LENGTHS, WIDTH, [[0], [1]]) == pytest.approx(wanted)


def test_one_micro_batch_is_the_batch() -> None:
    assert token_weights("micro-batch", LENGTHS, WIDTH, [[0, 1]]) == pytest.approx([1 / 4, 1 / 4])
    assert token_weights("longest", LENGTHS, WIDTH, [[0, 1]]) == pytest.approx([1 / 6, 1 / 6])
    with pytest.raises(ValueError, match="micro-batches"):
        token_weights("longest", LENGTHS, WIDTH)


@pytest.mark.parametrize("rule", RULES)
def test_the_strength_is_that_of_the_weights_where_all_lengths_are_equal(rule: Rule) -> None:
    weights = token_weights(rule, [5, 5], 20, [[0], [1]])
    assert strength(rule, 5, 20) == pytest.approx(weights[0] * 10)
    assert RULES[rule].kind in MEANINGS


def test_without_a_length_there_is_no_number() -> None:
    assert strength("responses", None, None) is None
    assert strength("constant", 5, None) is None
    assert strength("batch", None, None) == 1


def test_the_factors_are_those_that_were_measured() -> None:
    modes = {"trl": TRL, "verl": VERL}
    mean = 43 / 8  # of the measurement's eight responses
    rows = [row for row in json.loads(MEASURED.read_text("utf-8"))["portable_beta"] if row["host"] in modes]
    compared = 0
    for row in rows:
        rule = modes[row["host"]][row["aggregation"]]
        if rule in ("batch", "responses", "constant"):  # the others have no one factor for responses of unequal lengths
            found = strength(rule, mean, 8)
            assert found is not None
            assert 1 / found == pytest.approx(row["scale"], rel=1e-3)
            compared += 1
    assert compared >= 5
