"""Tests of the metadata of the installed distribution, and of its agreement with the pinned versions."""

import re
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kl_plugins import __version__

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = [ROOT / "constraints.txt", *sorted((ROOT / "tests" / "constraints").glob("*.txt"))]


@pytest.fixture(scope="module")
def ours() -> list[Requirement]:
    return [Requirement(line) for line in distribution("kl-plugins").requires or []]


def pins(path: Path) -> dict[str, str]:
    """Return the pinned versions of a constraints file and of the files that it includes."""
    found: dict[str, str] = {}
    for line in path.read_text().splitlines():
        if included := re.fullmatch(r"-c (\S+)", line):
            found |= pins(path.parent / included[1])
        elif line and not line.startswith("#"):
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", f"{path.name}: {line} does not pin one version"
            found[canonicalize_name(requirement.name)] = specifier.version
    return found


def stated_version() -> str:
    """Return the version in pyproject.toml."""
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert found, "pyproject.toml states no version"
    return found[1]


def test_metadata_states_licence_and_python() -> None:
    metadata = distribution("kl-plugins").metadata
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra") or ()) >= {"trl", "verl", "bench", "dev"}


def test_pyproject_and_the_package_state_one_version() -> None:
    assert stated_version() == __version__


def test_changelog_begins_with_the_stated_version() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    released = [heading for heading in headings if heading != "[Unreleased]"]
    dated = re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d", released[0])
    assert dated, f"'{released[0]}' does not have the form of a released version, [X.Y.Z] - YYYY-MM-DD"
    assert dated[1] == stated_version()
    assert "[Unreleased]" not in headings[1:], "unreleased changes must be above all released ones"


def test_citation_states_the_version_and_its_date() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    version, date = (
        re.search(rf'^{key}: "?([\w.-]+)"?$', citation, re.MULTILINE) for key in ("version", "date-released")
    )
    assert version, "CITATION.cff states no version"
    assert date, "CITATION.cff states no date-released"
    assert f"## [{version[1]}] - {date[1]}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert version[1] == stated_version()


def test_dependencies_are_the_agreed_ones_with_lower_bounds_only(ours: list[Requirement]) -> None:
    base = {requirement.name for requirement in ours if requirement.marker is None}
    assert base == {"torch", "wrapt", "packaging", "rich"}
    operators = {specifier.operator for requirement in ours for specifier in requirement.specifier}
    assert operators == {">="}


def test_entry_points() -> None:
    entries = {(entry.group, entry.name): entry for entry in distribution("kl-plugins").entry_points}
    assert callable(entries["console_scripts", "kl-plugins"].load())
    assert ("kl_plugins.hosts", "trl") in entries
    own = [name for group, name in entries if group == "kl_plugins.estimators"]
    assert not own, "the estimators of kl-plugins are rows of its table and need no entry point"


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_pins_satisfy_the_bounds(path: Path, ours: list[Requirement]) -> None:
    pinned = pins(path)
    assert pinned["torch"] == pins(ROOT / "constraints.txt")["torch"]
    for requirement in ours:
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is None or requirement.specifier.contains(version), f"{path.name}: {requirement} but {version}"
