"""Tests of the repository: its folders, generated pages, and that no file names a machine or a package index."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GENERATED = {"build", "dist", "out", "__pycache__"}
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".cfg", ".sh", ".json", ""}
# The patterns are written in parts, so that they do not match this file.
PLACES = re.compile(
    r"(?<![\w.~])/(?:" + "|".join(["home", "root", "opt", "work", "Users", "mnt"]) + r")/\w"
    "|" + r"(?:py" + r"pi|python" + r"hosted|py" + r"torch)\.org/(?:sim" + r"ple|wh" + r"l)"
    "|" + "--(?:extra-)?index" + "-url|--find" + "-links"
)


def generated(name: str) -> bool:
    return name in GENERATED or name.endswith(".egg-info") or (name.startswith(".") and name != ".ci")


def text_files() -> Iterator[Path]:
    for folder, subfolders, names in os.walk(ROOT):
        subfolders[:] = [name for name in subfolders if not generated(name)]
        yield from (path for path in (Path(folder, name) for name in sorted(names)) if path.suffix in TEXT)


def test_top_level_folders_are_the_agreed_ones() -> None:
    folders = {entry.name for entry in ROOT.iterdir() if entry.is_dir() and not generated(entry.name)}
    assert folders == {"kl_plugins", "adapters", "patches", "tests", "benchmarks", "docs", ".ci"}


def test_no_file_names_a_machine_or_an_index() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if PLACES.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    ["cd /" + "home/me/kl", 'open("/' + 'opt/data")', "pip install --index" + "-url x", "https://py" + "pi.org/simple"],
)
def test_places_are_seen(line: str) -> None:
    assert PLACES.search(line)


def test_the_page_of_faults_is_that_of_the_contract() -> None:
    from tests.contract import document

    assert document.PAGE.read_text(encoding="utf-8") == document.page(), "run python -m tests.contract.document"


def test_the_table_of_guards_names_tests_that_exist() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = guide.partition("## Guards against")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(test_\w+)`", table))
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    defined = {name for source in sources for name in re.findall(r"^def (test_\w+)\(", source, re.MULTILINE)}
    assert len(named) > 20
    assert named <= defined
