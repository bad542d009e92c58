"""Rules about combinations of parts; a combination without a meaning is refused with its reason.

What one option contradicts is in its row of :mod:`kl_plugins.spec.options`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

from kl_plugins.spec.errors import KLSpecError
from kl_plugins.spec.options import ALLOW_BIASED, OPTIONS

if TYPE_CHECKING:
    from kl_plugins.spec import KLSpec


class HasPosition(Protocol):
    """Where a part stands in the text."""

    @property
    def start(self) -> int:
        """Index of the first character."""

    @property
    def end(self) -> int:
        """Index behind the last character."""


def check(text: str, spec: KLSpec, parts: Mapping[str, HasPosition]) -> None:
    """Raise :class:`KLSpecError` at the first contradiction.

    Args:
        text: the whole spec.
        spec: what its parts say.
        parts: the options the user wrote, by name.
    """
    for name, problem, expected in contradictions(spec, parts):
        part = parts.get(name)
        start, end = (part.start, part.end) if part else (0, len(text))
        raise KLSpecError(text, start, end, problem, expected)


def contradictions(spec: KLSpec, written: Collection[str]) -> Iterator[tuple[str, str, str]]:
    """What is wrong with a spec as a whole: option (empty for the whole spec), problem, what would be right.

    Args:
        spec: what its parts say.
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
