"""Generated parts of hand-written pages, between two marks each."""

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
        name: of the part, unique on its page.
        write: gives its Markdown.
    """

    page: str
    name: str
    write: Callable[[], str]

    @property
    def path(self) -> Path:
        """The page's file."""
        return DOCS / self.page

    def renewed(self, text: str) -> str:
        """The page with this part as the code gives it.

        Raises:
            ValueError: a mark is missing.
        """
        begin, end = f"<!-- {self.name}: written by `python -m tests.pages` -->", f"<!-- end of {self.name} -->"
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not found_begin or not found_end:
            raise ValueError(f"docs/{self.page} has lost the mark {begin if not found_begin else end}")
        return f"{before}{begin}\n\n{self.write()}\n\n{end}{after}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a bar in a cell is escaped."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def renewed_pages(parts: Iterable[Part]) -> dict[Path, str]:
    """Every page that has parts, with all of them as the code gives them."""
    pages: dict[Path, str] = {}
    for part in parts:
        text = pages.get(part.path) or part.path.read_text(encoding="utf-8")
        pages[part.path] = part.renewed(text)
    return pages
