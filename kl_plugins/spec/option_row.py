"""What one row of the table of options holds, and the kinds of values that an option can take."""

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
"""A reference, and the part of the spec that comes from it; None without one."""

Fault: TypeAlias = tuple[str, str]
"""A fault of an option in its spec, and its correction."""


class BadValueError(Exception):
    """A text that is no value of an option: what is wrong, what was expected, the nearest valid word."""

    def __init__(self, problem: str, expected: str, nearest: str | None = None) -> None:
        super().__init__(problem)
        self.problem, self.expected, self.nearest = problem, expected, nearest


@dataclass(frozen=True)
class Values:
    """The values that an option can take.

    Attributes:
        form: how a value looks, for one line of text; empty for a flag.
        read: text to value; raises :class:`BadValueError`.
        write: value to its shortest text, which ``read`` reads back as the same value.
        effect: what a value does in a spec in which the option acts.
        meanings: the valid words and what each does; empty where values are no words.
        forms: every way a value can look; by default the words, else ``form`` alone.
        examples: canonical text, another way to write the same value, and the value; tests build their specs of them.
        bare: the value of the option written without a colon; None where a value has to be written.
    """

    form: str
    read: Callable[[str], Any]
    write: Callable[[Any], str]
    effect: Callable[[Any], str]
    meanings: Mapping[str, str] = field(default_factory=dict)
    forms: tuple[str, ...] = ()
    examples: tuple[tuple[str, str, Any], ...] = ()
    bare: Any = None

    @property
    def is_flag(self) -> bool:
        """Whether the option is written without a value."""
        return not self.form


def words(meanings: Mapping[str, str]) -> Values:
    """One of a few words, each with what it does."""

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
    bare: float | None = None,
) -> Values:
    """A number.

    Args:
        form: how it is named, such as ``<c>``.
        effect: from the number's shortest text to what it does.
        examples: shortest text -> another way to write the number.
        expected: what is said of a number that will not do.
        holds: which numbers will do.
        of: ``int`` where the number counts something.
        bare: the number where none is written.
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
        bare=bare,
    )


def flag(effect: str) -> Values:
    """Values of an option that is written without a value."""
    return Values("", lambda _: True, lambda _: "", lambda _: effect, examples=(("", "", True),))


@dataclass(frozen=True)
class Places:
    """The placements in which an option has a meaning, and why not in the others."""

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

    A field that is "text or function" holds a text that is said where the option is set to something else than its
    default, or a function of the spec whose result is said unless it is empty.

    Attributes:
        name: the word in the spec.
        values: what may follow its colon.
        meaning: one line on what the option is for.
        attribute: the attribute of :class:`~kl_plugins.spec.KLSpec` that holds the value; by default ``name``.
        other_names: other spellings that are read as ``name``.
        places: the placements that allow it.
        default: its default as a function of estimator, placement and horizon, where these decide it.
        faults: contradictions between this option, where a user wrote it, and the rest of the spec.
        acts: whether it has an effect in a spec; by default where it is set to something else than its default.
        unset: what is shown in place of the value None, and what that does.
        weight: puts this option into the formula of the importance weight, from its value and the formula so far.
        caveat: text or function; what bends the estimate although the target stays.
        bends: whether it makes the estimate biased off-policy.
        on_policy: text or function; how it bends the estimate where every weight is 1.
        nothing_left: text or function; why nothing at all is left where every weight is 1.
        source: as text or function; where the option comes from.
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
        """The option's value in a spec."""
        return getattr(spec, self.attribute)

    def default_in(self, spec: KLSpec) -> Any:
        """The option's value in a spec of this estimator, placement and horizon that does not name it."""
        if self.default is not None:
            return self.default(spec)
        return getattr(type(spec), self.attribute)

    def is_set(self, spec: KLSpec) -> bool:
        """Whether the value is another one than the default."""
        return bool(self.value(spec) != self.default_in(spec))

    def written(self, spec: KLSpec) -> str:
        """The option in the canonical text, with its slash; empty at its default."""
        if not self.is_set(spec):
            return ""
        return f"/{self.name}" if self.values.is_flag else f"/{self.name}:{self.values.write(self.value(spec))}"

    def misplaced(self, spec: KLSpec) -> Iterator[Fault]:
        """The fault of an option that the spec's placement does not allow."""
        if spec.placement not in self.places.allowed:
            names = {"name": self.name, "placement": spec.placement}
            yield self.places.problem.format(**names), self.places.expected.format(**names)

    def in_effect(self, spec: KLSpec) -> tuple[str, str] | None:
        """The value as text and what it does, or None where the option has no effect in this spec."""
        if not (self.is_set(spec) if self.acts is None else self.acts(spec)):
            return None
        value = self.value(spec)
        return self.unset if value is None else (self.values.write(value), self.values.effect(value))

    def said(self, what: T | Callable[[KLSpec], T], spec: KLSpec, nothing: T) -> T:
        """Resolve one of the "text or function" fields for a spec."""
        if callable(what):
            return what(spec)
        return what if self.is_set(spec) else nothing
