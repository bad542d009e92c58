"""Printing: paragraphs beside labels, made for narrow terminals and pipes; JSON; errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kl_plugins.spec import KLSpecError

if TYPE_CHECKING:
    from rich.console import Console

NARROWEST_TEXT = 44
"""Text with fewer columns than this beside its label goes below it."""

Row = tuple[str, str]


def print_json(document: object, status: int = 0) -> int:
    """Write one JSON document to standard output and return ``status``."""
    print(json.dumps(document, indent=2, ensure_ascii=False))
    return status


def fail(message: str, as_json: bool, status: int, **details: Any) -> int:
    """Report an error: text on standard error, or JSON on standard output.

    Args:
        message: what is wrong and what to do.
        as_json: the user asked for JSON.
        status: exit status to return.
        details: further keys of the JSON object.

    Returns:
        ``status``.
    """
    if as_json:
        return print_json({"error": {"message": message, **details}}, status)
    print(message, file=sys.stderr)
    return status


def fail_spec(error: KLSpecError, as_json: bool) -> int:
    """Report a bad spec; exit status 2, as for any usage error."""
    return fail(
        str(error),
        as_json,
        2,
        text=error.text,
        problem=error.problem,
        start=error.start,
        end=error.end,
        expected=error.expected,
        nearest=error.nearest,
    )


class Page:
    """Sections of labelled paragraphs on standard output; colours only on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console: Console = Console(highlight=False, markup=False, emoji=False)

    def title(self, text: str) -> None:
        """One line that says what the page is about."""
        self._wrapped(text, "bold")

    def paragraph(self, text: str, style: str = "") -> None:
        """A paragraph of its own, after an empty line."""
        self._console.print()
        self._wrapped(text, style)

    def section(self, heading: str, rows: Iterable[Row], styles: dict[str, str] | None = None) -> None:
        """A heading and its labelled paragraphs; nothing where there are none.

        Args:
            heading: may be empty.
            rows: label and text; an empty label continues the one above.
            styles: label -> rich style of that label.
        """
        rows = list(rows)
        if not rows:
            return
        self._console.print()
        if heading:
            self._wrapped(heading, "bold")
        indent = 4 + max(len(label) for label, _ in rows)
        beside = self._console.width - indent >= NARROWEST_TEXT
        for label, text in rows:
            style = (styles or {}).get(label, "cyan")
            if beside:
                self._wrapped(text, start=(f"  {label}".ljust(indent), style))
            else:
                if label:
                    self._wrapped(label, style, start=("  ", ""))
                self._wrapped(text, start=("    ", ""))

    def _wrapped(self, text: str, style: str = "", start: tuple[str, str] = ("", "")) -> None:
        """Wrap text behind a start (and its style), with a hanging indent."""
        from rich.text import Text

        # Own lines rather than a table: a table pads each line with blanks, which a pipe would keep.
        head, head_style = start
        width = max(self._console.width - len(head), 1)
        for line in Text(text, style=style).wrap(self._console, width):
            line.rstrip()
            self._console.print(Text.assemble((head, head_style), line), soft_wrap=True)
            head = " " * len(head)
