"""A mistake in a spec is a KLSpecError that says where, what was expected and the nearest word; nothing else raises."""

from __future__ import annotations

import pickle
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kl_plugins import KLSpec, KLSpecError
from kl_plugins.spec import PRESETS
from kl_plugins.spec.grammar import MAX_LENGTH
from tests.support.core.specs import ORDER, Written, written_specs


def error_of(text: object) -> KLSpecError:
    with pytest.raises(KLSpecError) as caught:
        KLSpec.parse(text)  # type: ignore[arg-type]
    return caught.value


@pytest.mark.parametrize(
    ("text", "part", "nearest"),
    [
        ("k4@loss", "k4", "k3"),
        ("hellingr@loss", "hellingr", "hellinger"),
        ("K2@loss", "K2", "k2"),
        ("jeffrey@loss", "jeffrey", "jeffreys"),
        ("@loss", "", None),
        ("alpha-0@loss", "alpha-0", None),
        ("alpha-@loss", "alpha-", None),
        ("alpha--1@loss", "alpha--1", None),
        ("alpha-nan@loss", "alpha-nan", None),
        ("alpha-inf@loss", "alpha-inf", None),
        ("alpha-1e999@loss", "alpha-1e999", None),
        ("alpha-<a>@loss", "alpha-<a>", None),
        ("k2@los", "los", "loss"),
        ("k2@rewards", "rewards", "reward"),
        ("k2@Advantage", "Advantage", "advantage"),
        ("k2@", "", None),
        ("k2@loss@reward", "loss@reward", None),
        ("k2@loss/", "", None),
        ("k2@loss//norm", "", None),
        ("k2@loss/horizn:token", "horizn:token", "horizon"),
        ("k2@loss/behavor:old", "behavor:old", "behaviour"),
        ("k2@loss/is:token/behavior:olde", "olde", "old"),
        ("k2@loss/is:token/behaviour:old/behavior:old", "behavior:old", None),
        ("k2@loss/is:tokens", "tokens", "token"),
        ("k2@loss/is:", "", None),
        ("k2@loss/is", "", None),
        ("k2@loss/is:none:none", "none:none", None),
        ("k2@loss/is:token/is:token", "is:token", None),
        ("k2@loss/is:token/cap:2/cap:3", "cap:3", None),
        ("k2@loss/is:token/norm:true", "norm:true", None),
        ("k2@loss/is:token/norm:", "norm:", None),
        ("k2@loss/is:token/behaviour:olde", "olde", "old"),
        ("k2@loss/horizon:seqence", "seqence", "sequence"),
        ("k2@loss/horizon:sequence/future:k2", "k2", "k3"),
        ("k1@loss/allow:bias", "bias", "biased"),
        ("k2@loss/beta:lin-1-2-3", "lin-1-2-3", "linear"),
    ],
)
def test_words(text: str, part: str, nearest: str | None) -> None:
    error = error_of(text)
    assert error.text[error.start : error.end] == part
    if nearest is not None:
        assert error.nearest == nearest
        assert f"did you mean: {nearest}" in str(error)


@pytest.mark.parametrize(
    "option",
    [
        f"cap:{x}"
        for x in ("0", "-1", "nan", "inf", "-inf", "1e999", "1e-999", "two", "", "1,5", "0x10", "1_0", "٢", " 2")
    ]
    + [f"floor:{x}" for x in ("0", "-0.5", "1.01", "2", "nan", "0.2-0.5", "")]
    + [f"clip:{x}" for x in ("0", "-0.2", "nan", "0.2-0.3")]
    + [f"bound:{x}" for x in ("0", "-30", "nan", "1e999")]
    + [f"gamma:{x}" for x in ("-0.1", "1.01", "nan", "2", "")]
    + [f"top:{x}" for x in ("0", "-1", "1.5", "nan", "all", "")]
    + [f"band:{x}" for x in ("2", "2-1", "0-0", "0.5", "-1-2", "0.5-nan", "0.5-inf", "1-2-3", "0.5_2", "", "-", "1-")]
    + [f"beta:{x}" for x in ("linear-1-2", "linear-1-2-3-4", "linear-1-2-0", "linear-1-2-1.5", "linear", "")]
    + [f"beta:{x}" for x in ("cosine-0-1", "cosine-0-1-0.5", "cosine--1-1-10", "adaptive-0-10", "adaptive-6-0")]
    + [f"beta:{x}" for x in ("adaptive-6", "adaptive-nan-10", "dual-1-0", "dual-1", "dual-1-inf", "constant-1")],
)
def test_numbers(option: str) -> None:
    name, _, value = option.partition(":")
    error = error_of(f"k2@loss/{option}")
    assert error.text[error.start : error.end] == value
    assert error.start == len(f"k2@loss/{name}:")
    assert name in error.problem
    assert error.expected


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_takes_no_options(name: str) -> None:
    error = error_of(f"{name}/gamma:0.5")
    assert "takes no options" in error.problem
    assert PRESETS[name] in error.expected


def test_a_bare_estimator_is_the_hosts_value() -> None:
    error = error_of("k2")
    assert "host's own value" in error.problem
    assert error.nearest == "k2@loss"


@pytest.mark.parametrize(
    ("text", "nearest"), [("defalt", "default"), ("reinforce+", "reinforce++"), ("deepseek", "deepseek-v3.2")]
)
def test_a_misspelt_preset_names_the_nearest(text: str, nearest: str) -> None:
    assert error_of(text).nearest == nearest


@pytest.mark.parametrize("text", ["", "   ", "\n", "/", "@", ":"])
def test_nothing_is_no_spec(text: str) -> None:
    assert error_of(text).expected


@pytest.mark.parametrize("value", [None, 0.1, True, b"k2@loss", ["k2@loss"], {"k2": 1}])
def test_a_spec_is_text(value: object) -> None:
    assert f"not {type(value).__name__}" in error_of(value).problem


def test_absurd_length() -> None:
    text = "k2@loss/" + "is:token/" * 1_000_000
    error = error_of(text)
    assert error.text[error.start : error.end] == text[MAX_LENGTH:]
    assert str(MAX_LENGTH) in error.expected
    assert len(str(error)) < 1000


def test_the_longest_possible_spec_is_not_too_long() -> None:
    number = "1.2345678901234567e-100"
    options = f"top:{2**53}/horizon:sequence/future:exact/gamma:{number}/is:decision/behaviour:sampler/cap:{number}"
    text = f"exact@loss/{options}/band:{number}-{number}/norm/bound:{number}"
    assert str(KLSpec.parse(text)).startswith("exact@loss/top:")


def test_the_caret_stands_under_the_part() -> None:
    lines = str(error_of("k2@loss/is:tokens/cap:2")).splitlines()
    spec, caret = lines[1], lines[2]
    start = caret.index("^")
    assert spec[start : caret.rindex("^") + 1] == "tokens"


@given(st.text(max_size=300))
def test_hostile_text_raises_nothing_else(text: str) -> None:
    assert_parses_or_explains(text)


PIECES = [*ORDER, "@", "/", ":", "-", ".", "k2", "k3+", "alpha-", "exact", "loss", "reward", "advantage", "token"]
PIECES += ["sequence", "0", "1", "1e3", "e", "biased", "linear", "dual", "nan", "inf", " ", "\x00", "\ud800", "٣"]


@settings(max_examples=200)
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_scrambled_words_raise_nothing_else(text: str) -> None:
    assert_parses_or_explains(text)


@settings(max_examples=200)
@given(written_specs(), st.data())
def test_a_typo_raises_nothing_else(written: Written, data: st.DataObject) -> None:
    text = written.text
    at = data.draw(st.integers(0, len(text)))
    with_typo = text[:at] + data.draw(st.sampled_from(string.printable)) + text[at + data.draw(st.integers(0, 3)) :]
    assert_parses_or_explains(with_typo)


def assert_parses_or_explains(text: str) -> None:
    try:
        spec = KLSpec.parse(text)
    except KLSpecError as error:
        assert_well_formed(error)
    else:
        assert KLSpec.parse(str(spec)) == spec


def assert_well_formed(error: KLSpecError) -> None:
    assert isinstance(error, ValueError)
    assert 0 <= error.start <= error.end <= len(error.text)
    assert error.problem
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is KLSpecError
    assert str(again) == str(error)
    assert vars(again) == vars(error)
