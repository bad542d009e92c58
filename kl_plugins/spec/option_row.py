"""The type of one row of the table of options, and the kinds of values that an option can take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from kl_plugins.spec.errors import nearest_word
from kl_plugins.spec.grammar import format_number, parse_number

if TYPE_CHECKING:
    from kl_plugins.spec import KLSpec

T = TypeVar("T")

Reference: TypeAlias = "tuple[str, str] | None"
"""A reference, and the part of the spec that comes from it; None without a reference."""

Fault: TypeAlias = tuple[str, str]
"""A fault of an option in a spec, and its correction."""


class BadValueError(Exception):
    """A text that is not a value of an option, with the problem, what was expected, and the nearest valid word."""

    def __init__(self, problem: str, expected: str, nearest: str | None = None) -> None:
        super().__init__(problem)
        self.problem, self.expected, self.nearest = problem, expected, nearest


@dataclass(frozen=True)
class Values:
    """The values that an option can take.

    Attributes:
        form: notation of a value in one line of text; empty for a flag.
        read: converts text to a value; raises :class:`BadValueError`.
        write: converts a value to its shortest text, which ``read`` reads back as the same value.
        effect: describes what a value does in a spec in which the option has an effect.
        meanings: the valid words and what each does; empty if the values are not words.
        forms: all notations of a value; by default the words, or ``form`` alone if the values are not words.
        examples: canonical text, another way to write the same value, and the value; tests build their specs from them.
        bare: values of options, by name, if this option is written without a colon; they apply to other options only
            where these are not written. Empty if a value must be written.
    """

    form: str
    read: Callable[[str], Any]
    write: Callable[[Any], str]
    effect: Callable[[Any], str]
    meanings: Mapping[str, str] = field(default_factory=dict)
    forms: tuple[str, ...] = ()
    examples: tuple[tuple[str, str, Any], ...] = ()
    bare: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_flag(self) -> bool:
        """Return whether the option is written without a value."""
        return not self.form


def words(meanings: Mapping[str, str]) -> Values:
    """Return values that are one of a few words, from each word and what it does."""

    def read(text: str) -> str:
        if text not in meanings:
            problem = f"unknown value {text!r}" if text else "no value"
            raise BadValueError(problem, "one of " + ", ".join(meanings), nearest_word(text, meanings))
        return text

    return Values(
        "|".join(meanings),
        read,
        str,
        meanings.__getitem__,
        meanings,
        tuple(meanings),
        tuple((word, word, word) for word in meanings),
    )


def number(
    form: str,
    effect: Callable[[str], str],
    examples: Mapping[str, str],
    *,
    expected: str = "a finite number > 0, decimal or like 1e-3",
    holds: Callable[[float], bool] = lambda x: x > 0,
    of: Callable[[float], float] = float,
    bare: Mapping[str, float] | None = None,
) -> Values:
    """Return values that are a number.

    Args:
        form: notation of the number, such as ``<c>``.
        effect: from the number's shortest text to a description of what it does.
        examples: shortest text -> another way to write the number.
        expected: text for the error about an invalid number.
        holds: returns whether a number is valid.
        of: ``int`` if the number is a count.
        bare: the numbers of this and other options, by name, if none is written.
    """

    def read(text: str) -> float:
        found = parse_number(text)
        if found is None or not holds(found):
            raise BadValueError(f"{text!r} will not do", expected)
        return of(found)

    return Values(
        form,
        read,
        format_number,
        lambda value: effect(format_number(value)),
        forms=(form,),
        examples=tuple((short, other, of(float(other))) for short, other in examples.items()),
        bare=bare or {},
    )


def flag(effect: str) -> Values:
    """Return the values of an option that is written without a value."""
    return Values("", lambda _: True, lambda _: "", lambda _: effect, examples=(("", "", True),))


@dataclass(frozen=True)
class Places:
    """The placements in which an option has a meaning, and the reason why it has none in the others."""

    allowed: tuple[str, ...]
    problem: str = ""
    expected: str = ""


ANYWHERE = Places(("loss", "reward", "advantage"))
LOSS_ONLY = Places(
    ("loss",),
    "{name!r} has no meaning for @{placement}: the host weights the whole policy-gradient term",
    "{name!r} only with @loss",
)
NOT_IN_REWARD = Places(
    ("loss", "advantage"),
    "{name!r} has no meaning for @{placement}: the host's return decides how far a reward reaches",
    "@advantage or @loss with this option, or @reward without it",
)


@dataclass(frozen=True)
class OptionRow:
    """One option of the spec, described completely.

    A field that is "text or function" holds a text or a function of the spec. A text is shown if the option is not at
    its default. The result of a function is shown unless it is empty.

    Attributes:
        name: the word in the spec.
        values: the values that may follow its colon.
        meaning: one line that says what the option is for.
        attribute: the attribute of :class:`~kl_plugins.spec.KLSpec` that holds the value; by default ``name``.
        other_names: other spellings that are read as ``name``.
        places: the placements that allow the option.
        default: the default as a function of estimator, placement and horizon, if it depends on them.
        faults: contradictions between this option, if a user wrote it, and the rest of the spec.
        acts: whether the option has an effect in a spec; by default, if it is not at its default.
        unset: what is shown instead of the value None, and what that does.
        weight: puts this option into the formula of the importance weight, from its value and the formula so far.
        caveat: text or function; says what makes the estimate deviate although the target stays the same.
        bends: whether the option makes the estimate biased off-policy.
        on_policy: text or function; says how the estimate deviates if every weight is 1.
        nothing_left: text or function; says why the term is 0 if every weight is 1.
        source: reference or function; says where the option comes from.
    """

    name: str
    values: Values
    meaning: str
    attribute: str = ""
    other_names: tuple[str, ...] = ()
    places: Places = ANYWHERE
    default: Callable[[KLSpec], Any] | None = None
    faults: Callable[[KLSpec], Iterator[Fault]] = lambda _: iter(())
    acts: Callable[[KLSpec], bool] | None = None
    unset: tuple[str, str] = ("", "")
    weight: Callable[[Any, str], str] | None = None
    caveat: str | Callable[[KLSpec], str] = ""
    bends: bool = False
    on_policy: str | Callable[[KLSpec], str] = ""
    nothing_left: str | Callable[[KLSpec], str] = ""
    source: Reference | Callable[[KLSpec], Reference] = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "attribute", self.attribute or self.name)

    def value(self, spec: KLSpec) -> Any:
        """Return the option's value in a spec."""
        return getattr(spec, self.attribute)

    def default_in(self, spec: KLSpec) -> Any:
        """Return the option's value in a spec of this estimator, placement and horizon that does not set it."""
        if self.default is not None:
            return self.default(spec)
        return getattr(type(spec), self.attribute)

    def is_set(self, spec: KLSpec) -> bool:
        """Return whether the value differs from the default."""
        return bool(self.value(spec) != self.default_in(spec))

    def written(self, spec: KLSpec) -> str:
        """Return the option as it is in the canonical text, with its slash; empty if it is at its default."""
        if not self.is_set(spec):
            return ""
        return f"/{self.name}" if self.values.is_flag else f"/{self.name}:{self.values.write(self.value(spec))}"

    def misplaced(self, spec: KLSpec) -> Iterator[Fault]:
        """Yield a fault if the spec's placement does not allow the option."""
        if spec.placement not in self.places.allowed:
            names = {"name": self.name, "placement": spec.placement}
            yield self.places.problem.format(**names), self.places.expected.format(**names)

    def in_effect(self, spec: KLSpec) -> tuple[str, str] | None:
        """Return the value as text and what it does, or None if the option has no effect in this spec."""
        if not (self.is_set(spec) if self.acts is None else self.acts(spec)):
            return None
        value = self.value(spec)
        return self.unset if value is None else (self.values.write(value), self.values.effect(value))

    def said(self, what: T | Callable[[KLSpec], T], spec: KLSpec, nothing: T) -> T:
        """Resolve one of the "text or function" fields for a spec."""
        if callable(what):
            return what(spec)
        return what if self.is_set(spec) else nothing
