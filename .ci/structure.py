"""Measures the host layer: files and lines of code of ``adapters`` and ``patches``, at any commit.

Lines of code are lines with at least one token of the program; docstrings, comments and blank lines are not counted.
Tables of fingerprints are data, so they are counted separately.

Usage::

    python .ci/structure.py [COMMIT ...]    # without a commit: the working tree

How many functions a KL spec passes from the flag to the gradient is measured by ``tests/<host>/test_path.py``.
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("adapters", "patches")
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


class Size(NamedTuple):
    """Size of a folder.

    Attributes:
        files: number of Python files.
        code: number of lines of code, without tables of fingerprints.
        tables: number of lines in tables of fingerprints.
    """

    files: int
    code: int
    tables: int


def docstring_lines(tree: ast.AST) -> set[int]:
    """Return the line numbers of all strings that are statements, which are docstrings of any kind."""
    return {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }


def code_lines(source: str) -> int:
    """Return the number of lines of code in a Python source."""
    skipped = docstring_lines(ast.parse(source))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - skipped)


def sources(folder: str, commit: str | None) -> Iterator[tuple[str, str]]:
    """Yield path and text of each Python file in a folder, from a commit or (None) from the working tree."""
    if commit is None:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        return
    listed = _git("ls-tree", "-r", "--name-only", commit, folder).splitlines()
    for name in listed:
        if name.endswith(".py"):
            yield name, _git("show", f"{commit}:{name}")


def size(folder: str, commit: str | None) -> Size:
    """Measure one folder at a commit, or (None) in the working tree."""
    files = code = tables = 0
    for name, text in sources(folder, commit):
        files += 1
        lines = code_lines(text)
        if Path(name).name == "fingerprints.py":
            tables += lines
        else:
            code += lines
    return Size(files, code, tables)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Print one row per commit and folder."""
    print(f"{'commit':12} {'folder':10} {'files':>6} {'code':>6} {'tables':>7}")
    for commit in sys.argv[1:] or [None]:
        found = [size(folder, commit) for folder in FOLDERS]
        for folder, measured in (
            *zip(FOLDERS, found, strict=True),
            ("total", Size(*map(sum, zip(*found, strict=True)))),
        ):
            print(f"{commit or 'working tree':12} {folder:10} {measured.files:6} {measured.code:6} {measured.tables:7}")


if __name__ == "__main__":
    main()
