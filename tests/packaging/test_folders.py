"""Tests of the imports between the folders of tests and benchmarks."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = "tests.support"
FILES = sorted(str(path.relative_to(ROOT)) for name in ("tests", "benchmarks") for path in (ROOT / name).rglob("*.py"))


def modules(tree: ast.AST) -> Iterator[str]:
    """Yield every name that an import statement may load: a module, or a name in it, which may be a module as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def faults(file: str, source: str) -> list[str]:
    """Return the forbidden imports of a file; `file` is its path from the root of the repository."""
    in_benchmarks = file.startswith("benchmarks/") and not file.startswith("benchmarks/tests/")
    found = []
    for name in modules(ast.parse(source)):
        top, *rest = name.split(".")
        if top not in ("tests", "benchmarks"):
            continue
        if file.startswith("tests/") and top == "benchmarks":
            found.append(f"{file} imports {name}: files in tests/ must not need benchmarks/")
        if in_benchmarks and top == "tests" and name != "tests" and not f"{name}.".startswith(f"{SUPPORT}."):
            found.append(f"{file} imports {name}: benchmarks may use only {SUPPORT}")
        if in_benchmarks and name.startswith("benchmarks.tests"):
            found.append(f"{file} imports {name}: a benchmark must not need its tests")
        if any(part.startswith("test_") for part in rest):
            found.append(f"{file} imports {name}: what test files share belongs into {SUPPORT}")
    return found


def test_imports_stay_within_their_walls() -> None:
    assert len(FILES) > 100
    assert not [fault for file in FILES for fault in faults(file, (ROOT / file).read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    ("file", "source", "word"),
    [
        ("tests/trl/test_loss.py", "from benchmarks.study import models", "must not need benchmarks/"),
        ("tests/support/trl/trainers.py", "def f():\n    import benchmarks", "must not need benchmarks/"),
        ("benchmarks/drivers/launch.py", "from tests.trl import conftest", "may use only"),
        ("benchmarks/drivers/launch.py", "from tests import pages", "may use only"),
        ("benchmarks/drivers/launch.py", "from benchmarks.tests.core import host_fixture", "its tests"),
        ("tests/trl/test_loss.py", "from tests.trl.test_reward import BETA", "belongs into"),
        ("benchmarks/tests/trl/test_study.py", "from benchmarks.tests.trl import test_demo", "belongs into"),
    ],
)
def test_a_forbidden_import_is_found(file: str, source: str, word: str) -> None:
    assert word in " ".join(faults(file, source))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("benchmarks/drivers/launch.py", "from tests.support.trl import trainers\nfrom tests.support import trl"),
        ("benchmarks/tests/trl/test_study.py", "from benchmarks.study import models\nfrom tests.pages import parts"),
        ("tests/trl/test_loss.py", "from tests.support.trl.trainers import build"),
    ],
)
def test_a_permitted_import_is_not(file: str, source: str) -> None:
    assert not faults(file, source)
