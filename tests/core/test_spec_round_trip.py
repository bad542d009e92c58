"""Every valid spec parses to what was written, prints canonically and parses back to an equal value."""

from __future__ import annotations

import copy
import pickle
import re
import shlex
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kl_plugins import KLSpec, KLSpecError
from kl_plugins.spec import PRESETS, looks_like_spec
from kl_plugins.spec.grammar import DEFAULT_DRAWS, DEFAULT_TOP, format_number, parse_number, parse_numbers
from kl_plugins.spec.presets import NOTES
from kl_plugins.spec.target import TARGETS, caveats_with_source
from tests.support.core.specs import Written, written_specs


@settings(max_examples=200)
@given(written_specs())
def test_a_valid_spec_means_what_it_says(written: Written) -> None:
    spec = KLSpec.parse(written.text)
    for name, value in written.fields.items():
        assert getattr(spec, name) == value, name
    defaults = {field.name: field.default for field in fields(KLSpec) if field.name not in written.fields}
    for name, value in defaults.items():
        assert getattr(spec, name) == value, name


@settings(max_examples=300)
@given(written_specs())
def test_canonical_text_is_a_fixed_point_with_a_known_target(written: Written) -> None:
    spec = KLSpec.parse(written.text)
    assert str(spec) == written.canonical
    again = KLSpec.parse(str(spec))
    assert again == spec
    assert hash(again) == hash(spec)
    assert str(again) == str(spec)
    assert spec.target in TARGETS
    assert (spec.target == "none") == spec.allow_biased
    assert isinstance(spec.caveats, tuple)
    for name in ("floor", "cap", "band", "norm", "clip"):
        present = getattr(spec, name) not in (None, False)
        assert any(caveat.startswith(name) for caveat in spec.caveats) == present, name


def test_the_canonical_order() -> None:
    """The order in which options are printed is part of the interface: receipts and checkpoints hold such texts."""
    text = "exact@loss/top:20/horizon:sequence/future:k1/gamma:0.5/is:decision/behaviour:old/cap:2/band:0.5-2/norm"
    text += "/bound:20/beta:dual-0-0.01"
    assert str(KLSpec.parse(text)) == text
    head, *options = text.split("/")
    assert str(KLSpec.parse("/".join([head, *reversed(options)]))) == text
    floored = "k3@loss/is:token/behaviour:sampler/floor:0.2/cap:2"
    assert str(KLSpec.parse("k3@loss/cap:2/floor:.2/behaviour:sampler/is:token")) == floored
    assert str(KLSpec.parse("k1@loss/allow:biased/bound:20/clip:0.2")) == "k1@loss/clip:0.2/bound:20/allow:biased"


def test_the_american_spelling_is_read_and_not_printed() -> None:
    spec = KLSpec.parse("k2@loss/is:token/behavior:old")
    assert spec == KLSpec.parse("k2@loss/is:token/behaviour:old")
    assert str(spec) == "k2@loss/is:token/behaviour:old"


@given(written_specs())
def test_specs_travel_between_processes(written: Written) -> None:
    spec = KLSpec.parse(written.text)
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert copy.deepcopy(spec) == spec


@given(written_specs())
def test_specs_need_no_quoting(written: Written) -> None:
    for text in (written.text, written.canonical):
        assert shlex.split(f"--kl {text}") == ["--kl", text]
        # The characters that a POSIX shell, argparse, a Hydra override and a plain YAML scalar all leave alone;
        # a colon that is followed by a space, or ends the text, would start a YAML mapping.
        assert re.fullmatch(r"[a-z][A-Za-z0-9@/:.+_-]*[A-Za-z0-9.]", text)
        assert looks_like_spec(text)


def test_yaml_reads_a_spec_as_text() -> None:
    yaml = pytest.importorskip("yaml")
    for text in (*PRESETS, *PRESETS.values(), "k2@loss/is:token/cap:1e-3/band:0.5-2/beta:dual-0.1-1e-2"):
        assert yaml.safe_load(f"kl: {text}") == {"kl": text}
        assert yaml.safe_load(f"{{kl: {text}, beta: 1}}") == {"kl": text, "beta": 1}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("default", "k2@loss/is:token/floor:0.5"),
        ("ppo", "k1@reward"),
        ("grpo", "k3@loss"),
        ("deepseek-v3.2", "k3+@loss/is:token/behaviour:old"),
        ("frpo", "k1@advantage"),
        ("reinforce++", "k1@reward"),
        ("reinforce++-baseline", "k2@loss"),
        ("sequence", "k2@loss/horizon:sequence/is:decision"),
        ("exact", "exact@loss"),
    ],
)
def test_presets_expand(name: str, text: str) -> None:
    assert str(KLSpec.parse(name)) == text
    assert KLSpec.parse(f" {name}\n") == KLSpec.parse(text)
    assert looks_like_spec(name)
    assert NOTES[name]


def test_there_are_no_other_presets() -> None:
    assert set(PRESETS) == set(NOTES)
    assert len(PRESETS) == 9


@pytest.mark.parametrize("native", ["k1", "k2", "k3", "kl", "low_var_kl", "", "off", None, 0.1, True])
def test_native_values_are_no_specs(native: object) -> None:
    assert not looks_like_spec(native)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (0.5, "0.5"),
        (100.0, "100"),
        (1000.0, "1e3"),
        (1200.0, "1200"),
        (0.01, "0.01"),
        (0.001, "1e-3"),
        (0.1 + 0.2, "0.30000000000000004"),
        (5e-324, "5e-324"),
        (1.5e300, "1.5e300"),
        (1e22, "1e22"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert format_number(value) == text


@given(st.floats(min_value=0, allow_nan=False, allow_infinity=False))
def test_numbers_read_back(value: float) -> None:
    text = format_number(value)
    assert parse_number(text) == value
    assert len(text) <= len(repr(value))
    assert "+" not in text


@given(st.lists(st.floats(min_value=0, allow_nan=False, allow_infinity=False), min_size=1, max_size=4))
def test_joined_numbers_read_back(values: list[float]) -> None:
    assert parse_numbers("-".join(map(format_number, values))) == values


def test_only_the_whole_sum_is_said_to_be_exact_off_policy() -> None:
    """With top:, a sampled remainder is left, which is biased on another policy's data without its weight."""
    (whole,) = (caveat for caveat in KLSpec.parse("exact@loss").caveats if caveat.startswith("off-policy"))
    (top,) = (caveat for caveat in KLSpec.parse("exact@loss/top:16").caveats if caveat.startswith("off-policy"))
    assert "exactly" in whole
    assert "exactly" not in top
    assert "biased" in top
    for weighted in ("prefix", "token"):
        caveats = KLSpec.parse(f"exact@loss/top:16/is:{weighted}").caveats
        assert not any(caveat.startswith("off-policy") for caveat in caveats)


def test_top_without_a_number_is_the_default_and_printed_with_it() -> None:
    """Receipts and checkpoints say which number it was."""
    assert KLSpec.parse("exact@loss/top") == KLSpec.parse(f"exact@loss/top:{DEFAULT_TOP}/draws:{DEFAULT_DRAWS}")
    assert str(KLSpec.parse("exact@loss/is:token/top")) == "exact@loss/top:16/draws:8/is:token"
    for text in ("exact@loss/top/draws:3", "exact@loss/draws:3/top"):
        assert KLSpec.parse(text) == KLSpec.parse(f"exact@loss/top:{DEFAULT_TOP}/draws:3")
    assert KLSpec.parse("exact@loss/top:16").draws is None
    with pytest.raises(KLSpecError, match="whole number"):
        KLSpec.parse("exact@loss/top:")


def test_the_caveat_of_old_log_probs_is_said_once_whoever_chose_them() -> None:
    for text, source in (
        ("k2@loss/is:token/behaviour:old", "old"),
        ("k2@loss/is:token", "old"),
        ("k2@loss/is:token", "current"),
    ):
        found = [c for c in caveats_with_source(KLSpec.parse(text), source) if c.startswith("behaviour:old")]
        assert len(found) == 1, text
    for text, source in (("k2@loss/is:token", "sampler"), ("k2@loss", "unused"), ("k2@loss", "old")):
        assert not any("behaviour:old" in caveat for caveat in caveats_with_source(KLSpec.parse(text), source))
