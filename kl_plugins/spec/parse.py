"""Text to :class:`KLSpec`: splits the parts, reads each value, leaves contradictions to ``rules``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from kl_plugins.controllers import BetaSchedule
from kl_plugins.estimators import BUILT_IN, all_estimators, find_estimator
from kl_plugins.spec import KLSpec
from kl_plugins.spec.errors import KLSpecError, nearest_word
from kl_plugins.spec.grammar import (
    BETA_ARITY,
    BETA_FORMS,
    FLAGS,
    MAX_LENGTH,
    OPTION_ORDER,
    PLACEMENTS,
    WORDS,
    parse_number,
    parse_numbers,
)
from kl_plugins.spec.presets import NATIVE_VALUES, PRESETS
from kl_plugins.spec.rules import check, default_future, default_horizon


@dataclass(frozen=True)
class Part:
    """A piece of the spec and where it stands in the text."""

    text: str
    start: int

    @property
    def end(self) -> int:
        """Index behind the last character."""
        return self.start + len(self.text)

    def error(self, spec: str, problem: str, expected: str = "", nearest: str | None = None) -> KLSpecError:
        """Build the error that points at this part."""
        return KLSpecError(spec, self.start, self.end, problem, expected, nearest)


def parse_spec(text: str) -> KLSpec:
    """Read a spec or the name of a preset; see :meth:`KLSpec.parse`."""
    if not isinstance(text, str):
        raise KLSpecError(repr(text), 0, len(repr(text)), f"a spec is text, not {type(text).__name__}")
    text = text.strip()
    if len(text) > MAX_LENGTH:
        raise KLSpecError(text, MAX_LENGTH, len(text), f"{len(text)} characters", f"at most {MAX_LENGTH}")
    if text in PRESETS:
        return parse_spec(PRESETS[text])
    head, *options = _split(text)
    estimator, placement = _read_head(text, head, has_options=bool(options))
    values, parts = _read_options(text, options)
    if estimator.startswith("alpha-"):
        row = find_estimator(estimator)
        estimator = row.name if row else estimator
    horizon = values.pop("horizon", default_horizon(placement))
    spec = KLSpec(
        estimator=estimator,
        placement=placement,
        horizon=horizon,
        future=values.pop("future", default_future(estimator, horizon)),
        correction=values.pop("is", "none"),
        allow_biased=values.pop("allow", None) is not None,
        **values,
    )
    check(text, spec, parts)
    return spec


def _split(text: str) -> list[Part]:
    parts, start = [], 0
    for piece in text.split("/"):
        parts.append(Part(piece, start))
        start += len(piece) + 1
    return parts


def _read_head(text: str, head: Part, *, has_options: bool) -> tuple[str, str]:
    name, at, placement = head.text.partition("@")
    if not at:
        known = _known_estimators()
        if name in PRESETS and has_options:
            raise head.error(text, f"preset {name!r} takes no options", f"the preset alone, or {PRESETS[name]}/...")
        near = nearest_word(name, [*PRESETS, *known])
        if name in NATIVE_VALUES or find_estimator(name):
            problem = f"{name!r} alone is the host's own value, not a spec"
            near = NATIVE_VALUES.get(name, f"{name}@loss")
        else:
            problem = f"no '@' in {name!r}" if name else "empty spec"
        raise head.error(text, problem, "<estimator>@<placement>, or a preset: " + ", ".join(PRESETS), near)
    part = Part(name, head.start)
    if find_estimator(name) is None:
        known = _known_estimators()
        expected = "one of " + ", ".join(sorted(known))
        if name.startswith("alpha-"):
            expected = "alpha-<a> with a number a > 0"
        raise part.error(text, f"unknown estimator {name!r}", expected, nearest_word(name, known))
    if placement not in PLACEMENTS:
        part = Part(placement, head.start + len(name) + 1)
        raise part.error(
            text,
            f"unknown placement {placement!r}",
            "one of " + ", ".join(PLACEMENTS),
            nearest_word(placement, PLACEMENTS),
        )
    return name, placement


def _known_estimators() -> set[str]:
    # Only for messages: the names of third-party rows cost the import of every package that registers some.
    return {*BUILT_IN, "alpha-<a>", *(row.name for row in all_estimators())}


def _read_options(text: str, options: list[Part]) -> tuple[dict[str, Any], dict[str, Part]]:
    values: dict[str, Any] = {}
    parts: dict[str, Part] = {}
    for part in options:
        name, colon, value = part.text.partition(":")
        if name not in OPTION_ORDER:
            raise part.error(
                text, f"unknown option {name!r}", "one of " + ", ".join(OPTION_ORDER), nearest_word(name, OPTION_ORDER)
            )
        if name in parts:
            raise part.error(text, f"option {name!r} is given twice", "each option once")
        if name in FLAGS and colon:
            raise part.error(text, f"{name!r} takes no value", name)
        values[name] = True if name in FLAGS else _read_value(text, name, Part(value, part.start + len(name) + 1))
        parts[name] = part
    return values, parts


def _read_value(text: str, name: str, part: Part) -> Any:
    if name in WORDS:
        if part.text not in WORDS[name]:
            problem = f"{name}: unknown value {part.text!r}" if part.text else f"{name}: no value"
            raise part.error(text, problem, "one of " + ", ".join(WORDS[name]), nearest_word(part.text, WORDS[name]))
        return part.text
    if name == "band":
        interval = parse_numbers(part.text)
        if interval is None or len(interval) != 2 or interval[0] > interval[1] or interval[1] == 0:
            raise part.error(
                text, f"band: {part.text!r} is no interval", "<lo>-<hi> with 0 <= lo <= hi, hi > 0, e.g. 0.5-2"
            )
        return interval[0], interval[1]
    if name == "beta":
        return _read_beta(text, part)
    number = parse_number(part.text)
    ranges: dict[str, tuple[str, Callable[[float], bool]]] = {
        "gamma": ("a number in [0, 1]", lambda x: x <= 1),
        "top": ("a whole number >= 1", lambda x: x >= 1 and x == int(x)),
    }
    expected, holds = ranges.get(name, ("a finite number > 0, decimal or like 1e-3", lambda x: x > 0))
    if number is None or not holds(number):
        raise part.error(text, f"{name}: {part.text!r} will not do", expected)
    return int(number) if name == "top" else number


def _read_beta(text: str, part: Part) -> BetaSchedule:
    kind, _, rest = part.text.partition("-")
    expected = "one of " + ", ".join(BETA_FORMS)
    if kind not in BETA_ARITY:
        raise part.error(text, f"beta: unknown schedule {kind!r}", expected, nearest_word(kind, BETA_ARITY))
    numbers = parse_numbers(rest)
    if numbers is None or len(numbers) != BETA_ARITY[kind]:
        raise part.error(text, f"beta: {kind} takes {BETA_ARITY[kind]} numbers joined by '-'", expected)
    for problem, wrong in _beta_faults(kind, numbers):
        if wrong:
            raise part.error(text, f"beta: {problem}", expected)
    return BetaSchedule(kind, tuple(numbers))


def _beta_faults(kind: str, numbers: list[float]) -> Iterator[tuple[str, bool]]:
    if kind in ("linear", "cosine"):
        yield "n counts updates: a whole number >= 1", numbers[2] < 1 or numbers[2] != int(numbers[2])
    if kind == "adaptive":
        yield "target and horizon must be > 0", min(numbers) == 0
    if kind == "dual":
        yield "the learning rate must be > 0", numbers[1] == 0
