"""Generated parts of hand-written pages; each part is between two marks in its page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


@dataclass(frozen=True)
class Part:
    """One generated part.

    Attributes:
        page: path of the page below ``docs/``.
        name: name of the part, unique on its page.
        write: function that returns the part as Markdown.
    """

    page: str
    name: str
    write: Callable[[], str]

    @property
    def path(self) -> Path:
        """The file of the page."""
        return DOCS / self.page

    def renewed(self, text: str) -> str:
        """Return the text of the page with this part generated again.

        Args:
            text: the present text of the page.

        Raises:
            ValueError: A mark of the part is missing in the text.
        """
        begin, end = f"<!-- {self.name}: written by `python -m tests.pages` -->", f"<!-- end of {self.name} -->"
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not found_begin or not found_end:
            raise ValueError(f"docs/{self.page} has lost the mark {begin if not found_begin else end}")
        return f"{before}{begin}\n\n{self.write()}\n\n{end}{after}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; a bar inside a cell is escaped."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def renewed_pages(parts: Iterable[Part]) -> dict[Path, str]:
    """Return the text of every page that has generated parts, with all its parts generated again."""
    pages: dict[Path, str] = {}
    for part in parts:
        text = pages.get(part.path) or part.path.read_text(encoding="utf-8")
        pages[part.path] = part.renewed(text)
    return pages
