"""What the installed distribution says about itself, and that our pins agree with it."""

import re
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = [ROOT / "constraints.txt", *sorted((ROOT / "tests" / "constraints").glob("*.txt"))]


@pytest.fixture(scope="module")
def ours() -> list[Requirement]:
    return [Requirement(line) for line in distribution("kl-plugins").requires or []]


def pins(path: Path) -> dict[str, str]:
    """The pinned versions of a constraints file and of those that it includes."""
    found: dict[str, str] = {}
    for line in path.read_text().splitlines():
        if included := re.fullmatch(r"-c (\S+)", line):
            found |= pins(path.parent / included[1])
        elif line and not line.startswith("#"):
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", f"{path.name}: {line} is no pin"
            found[canonicalize_name(requirement.name)] = specifier.version
    return found


def test_metadata_states_licence_and_python() -> None:
    metadata = distribution("kl-plugins").metadata
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra") or ()) >= {"trl", "verl", "openrlhf", "bench", "dev"}


def test_dependencies_are_the_agreed_ones_with_lower_bounds_only(ours: list[Requirement]) -> None:
    base = {requirement.name for requirement in ours if requirement.marker is None}
    assert base == {"torch", "wrapt", "packaging", "rich"}
    operators = {specifier.operator for requirement in ours for specifier in requirement.specifier}
    assert operators == {">="}


def test_entry_points() -> None:
    entries = {(entry.group, entry.name): entry for entry in distribution("kl-plugins").entry_points}
    assert callable(entries["console_scripts", "kl-plugins"].load())
    assert ("kl_plugins.hosts", "trl") in entries
    assert not [name for group, name in entries if group == "kl_plugins.estimators"], "ours are rows of the table"


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_pins_satisfy_the_bounds(path: Path, ours: list[Requirement]) -> None:
    pinned = pins(path)
    assert pinned["torch"] == pins(ROOT / "constraints.txt")["torch"]
    for requirement in ours:
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is None or requirement.specifier.contains(version), f"{path.name}: {requirement} but {version}"
