"""Rules about combinations of parts. A combination without a meaning is rejected, and the error says why.

The contradictions of a single option are in its row of :mod:`kl_plugins.spec.options`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

from kl_plugins.spec.errors import KLSpecError
from kl_plugins.spec.options import ALLOW_BIASED, OPTIONS

if TYPE_CHECKING:
    from kl_plugins.spec import KLSpec


class HasPosition(Protocol):
    """The position of a part in the text."""

    @property
    def start(self) -> int:
        """Return the index of the first character."""

    @property
    def end(self) -> int:
        """Return the index after the last character."""


def check(text: str, spec: KLSpec, parts: Mapping[str, HasPosition]) -> None:
    """Raise :class:`KLSpecError` at the first contradiction.

    Args:
        text: the whole spec as text.
        spec: the spec built from its parts.
        parts: the options that the user wrote, by name.
    """
    for name, problem, expected in contradictions(spec, parts):
        part = parts.get(name)
        start, end = (part.start, part.end) if part else (0, len(text))
        raise KLSpecError(text, start, end, problem, expected)


def contradictions(spec: KLSpec, written: Collection[str]) -> Iterator[tuple[str, str, str]]:
    """Yield the contradictions in a spec: option (empty for the whole spec), problem, and what would be valid.

    Args:
        spec: the spec built from its parts.
        written: names of the options that the user wrote.
    """
    rows = [row for name, row in OPTIONS.items() if name in written]
    for row in rows:
        yield from ((row.name, *fault) for fault in row.misplaced(spec))
    if spec.estimator == "exact" and spec.placement == "reward":
        yield (
            "",
            "exact@reward regularises nothing: KL_t is constant given the state, so as a score it cancels",
            "exact@loss, or exact@advantage (sampled own term, exact future)",
        )
    for row in rows:
        yield from ((row.name, *fault) for fault in row.faults(spec))
    if spec.target == "none" and not spec.allow_biased:
        yield (
            "",
            "its expected gradient is that of no divergence (kl-plugins explain says why)",
            f"another spec, or /{ALLOW_BIASED} if that is what you want to study",
        )
