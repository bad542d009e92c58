"""The error that an invalid KL spec raises."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KLSpecError(ValueError):
    """An invalid KL spec: the error names the wrong part, what was expected, and the nearest valid word.

    Attributes:
        text: the whole spec as the user wrote it.
        start, end: position of the wrong part, which is ``text[start:end]``.
        problem: one sentence that says what is wrong.
        expected: what would be valid instead.
        nearest: the nearest valid word, or None.
    """

    def __init__(
        self,
        text: str,
        start: int,
        end: int,
        problem: str,
        expected: str = "",
        nearest: str | None = None,
    ) -> None:
        self.text, self.start, self.end = text, start, end
        self.problem, self.expected, self.nearest = problem, expected, nearest
        super().__init__(self._message())

    def __reduce__(self) -> tuple[type[KLSpecError], tuple[object, ...]]:
        # The default pickles only the message. All fields are needed, because workers send this error to the driver.
        return type(self), (self.text, self.start, self.end, self.problem, self.expected, self.nearest)

    def _message(self) -> str:
        shown = self.text if len(self.text) <= 120 else self.text[:117] + "..."
        width = max(1, min(self.end, len(shown)) - self.start)
        lines = [f"bad KL spec: {self.problem}", f"  {shown}"]
        if self.start < len(shown):
            lines.append("  " + " " * self.start + "^" * width + f" (characters {self.start}-{self.end})")
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.nearest:
            lines.append(f"  did you mean: {self.nearest}")
        return "\n".join(lines)


def nearest_word(word: str, words: Iterable[str]) -> str | None:
    """Return the valid word that is most similar to ``word``, or None if no word is close."""
    found = difflib.get_close_matches(word.lower(), list(words), n=1, cutoff=0.5)
    return found[0] if found else None
