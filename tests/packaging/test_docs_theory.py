"""Tests that every test which the theory pages name exists in the file that they link to."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs" / "theory").glob("*.md")), ROOT / "docs" / "stability.md"]
NAMED = re.compile(r"\[`(test_\w+)`\]\(([^)#]+)\)")
ANY_TEST = re.compile(r"test_\w+(?!\w|\.py)")


def functions(path: Path) -> set[str]:
    """Return the names of the functions in a file."""
    found = ast.walk(ast.parse(path.read_text()))
    return {node.name for node in found if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_is_where_it_says(page: Path) -> None:
    named = NAMED.findall(page.read_text())
    assert named or page.name == "index.md"
    missing = [
        f"{name} in {target}" for name, target in named if name not in functions((page.parent / target).resolve())
    ]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_test_is_named_without_a_link(page: Path) -> None:
    text = re.sub(r"\]\([^)]*\)", "]", NAMED.sub("", page.read_text()))
    assert ANY_TEST.findall(re.sub(r"\w+\.py", "", text)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_formulas_are_closed(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    assert text.count("$$") % 2 == 0
    for paragraph in text.replace("$$", "").split("\n\n"):
        assert paragraph.count("$") % 2 == 0, paragraph
