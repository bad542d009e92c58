"""Conversion of text to :class:`KLSpec`: splits the parts and reads each value; ``rules`` finds contradictions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kl_plugins.estimators import BUILT_IN, all_estimators, find_estimator
from kl_plugins.spec import KLSpec
from kl_plugins.spec.errors import KLSpecError, nearest_word
from kl_plugins.spec.grammar import MAX_LENGTH, PLACEMENTS
from kl_plugins.spec.option_row import BadValueError
from kl_plugins.spec.options import BY_SPELLING, OPTIONS
from kl_plugins.spec.presets import NATIVE_VALUES, PRESETS
from kl_plugins.spec.rules import check


@dataclass(frozen=True)
class Part:
    """A part of the spec and its position in the text."""

    text: str
    start: int

    @property
    def end(self) -> int:
        """Return the index after the last character."""
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
        named = find_estimator(estimator)
        estimator = named.name if named else estimator
    spec = KLSpec(estimator, placement, **{OPTIONS[name].attribute: value for name, value in values.items()})
    for name, row in OPTIONS.items():
        if name not in values and row.default is not None:
            spec = replace(spec, **{row.attribute: row.default(spec)})
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
    # This set is used only in error messages, because it imports every package that registers estimators.
    return {*BUILT_IN, "alpha-<a>", *(row.name for row in all_estimators())}


def _read_options(text: str, options: list[Part]) -> tuple[dict[str, Any], dict[str, Part]]:
    values: dict[str, Any] = {}
    parts: dict[str, Part] = {}
    implied: dict[str, Any] = {}
    for part in options:
        name, colon, value = part.text.partition(":")
        row = BY_SPELLING.get(name)
        if row is None:
            expected = "one of " + ", ".join(OPTIONS)
            raise part.error(text, f"unknown option {name!r}", expected, nearest_word(name, OPTIONS))
        if row.name in parts:
            raise part.error(text, f"option {row.name!r} is given twice", "each option once")
        if row.values.is_flag and colon:
            raise part.error(text, f"{name!r} takes no value", name)
        try:
            if row.values.bare and not colon:
                implied |= row.values.bare
            else:
                values[row.name] = row.values.read(value)
        except BadValueError as bad:
            where = Part(value, part.start + len(name) + 1)
            raise where.error(text, f"{name}: {bad.problem}", bad.expected, bad.nearest) from None
        parts[row.name] = part
    return implied | values, parts
