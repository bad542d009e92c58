"""Output of the command line: labelled paragraphs that fit narrow terminals and pipes, JSON, and errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kl_plugins.spec import KLSpecError

if TYPE_CHECKING:
    from rich.console import Console

NARROWEST_TEXT = 44
"""Number of columns that text needs to stand beside its label; with fewer columns it is printed below the label."""

Row = tuple[str, str]
"""A label and its text."""


def print_json(document: object, status: int = 0) -> int:
    """Write one JSON document to standard output and return ``status``."""
    print(json.dumps(document, indent=2, ensure_ascii=False))
    return status


def fail(message: str, as_json: bool, status: int, **details: Any) -> int:
    """Report an error, as text on standard error or as JSON on standard output.

    Args:
        message: the problem and its remedy.
        as_json: whether to print JSON instead of text.
        status: the exit status to return.
        details: further keys of the JSON object.

    Returns:
        ``status``.
    """
    if as_json:
        return print_json({"error": {"message": message, **details}}, status)
    print(message, file=sys.stderr)
    return status


def fail_spec(error: KLSpecError, as_json: bool) -> int:
    """Report an invalid spec and return the exit status 2, which stands for any usage error.

    Args:
        error: the error that parsing the spec raised.
        as_json: whether to print JSON instead of text.
    """
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
    """Prints sections of labelled paragraphs on standard output, with colours if that is a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console: Console = Console(highlight=False, markup=False, emoji=False)

    def title(self, text: str) -> None:
        """Print the title of the page."""
        self._wrapped(text, "bold")

    def paragraph(self, text: str, style: str = "") -> None:
        """Print an empty line and a paragraph without a label."""
        self._console.print()
        self._wrapped(text, style)

    def section(self, heading: str, rows: Iterable[Row], styles: dict[str, str] | None = None) -> None:
        """Print a heading and its labelled paragraphs, or nothing if there are no paragraphs.

        Args:
            heading: the heading; an empty one is left out.
            rows: labels and texts; a row with an empty label continues the row above it.
            styles: maps a label to its rich style.
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
        """Print wrapped text after a start (a text and its style), with a hanging indent."""
        from rich.text import Text

        # rich's tables pad each line with blanks, which a pipe would keep. This code therefore prints single lines.
        head, head_style = start
        width = max(self._console.width - len(head), 1)
        for line in Text(text, style=style).wrap(self._console, width):
            line.rstrip()
            self._console.print(Text.assemble((head, head_style), line), soft_wrap=True)
            head = " " * len(head)
