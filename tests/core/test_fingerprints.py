"""Fingerprints follow the code of a host's functions, and its files are compared with those that were checked."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import textwrap
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from kl_plugins.adapters.versions import UnsupportedHostError
from kl_plugins.patches.engine.fingerprint import Sources, fingerprint, fingerprint_in_file, fingerprints_in_folder
from tests.support.core import toy_host

HERE = version("wrapt")
"""The version of the distribution that stands for the host's."""


def sources(package: Path, table: dict[str, dict[str, str]]) -> Sources:
    path = package.parent / "fingerprints.json"
    named = {f"{package.name}.work:{name}": digests for name, digests in table.items()}
    path.write_text(json.dumps(named))
    return Sources(toy_host.host(package.name), path)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return toy_host.write_package(tmp_path, monkeypatch)


def digest_of(package: Path, name: str) -> str:
    found = fingerprint_in_file(package / "work.py", name)
    assert found is not None
    return found


def test_known_sources_pass_and_nothing_is_imported(package: Path) -> None:
    found = sources(package, {"Host.answer": {"0.1": digest_of(package, "Host.answer")}})
    found.check()
    assert list(found.changed()) == []
    assert package.name not in sys.modules


def test_any_checked_version_of_a_function_passes(package: Path) -> None:
    found = sources(package, {"free": {"0.1": "0" * 16, "0.2": digest_of(package, "free"), "0.3": "1" * 16}})
    assert list(found.changed()) == []


def test_a_changed_function_is_named_with_its_fingerprint(package: Path) -> None:
    found = sources(package, {"free": {"0.1": digest_of(package, "free")}, "Host.answer": {"0.1": "0" * 16}})
    name = f"{package.name}.work:Host.answer"
    assert list(found.changed()) == [(name, digest_of(package, "Host.answer"))]
    with pytest.raises(UnsupportedHostError, match=rf"work\.Host\.answer of wrapt {HERE} is not the code"):
        found.check()


def test_a_changed_function_is_a_warning_if_the_user_allows_it(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KL_PLUGINS_ALLOW_UNTESTED", "1")
    with pytest.warns(RuntimeWarning, match="is not the code"):
        sources(package, {"free": {"0.1": "0" * 16}}).check()


def test_a_function_that_is_gone_has_no_fingerprint(package: Path) -> None:
    found = sources(package, {"Host.gone": {"0.1": "0" * 16}})
    assert list(found.changed()) == [(f"{package.name}.work:Host.gone", None)]


def test_functions_of_later_versions_are_not_expected(package: Path) -> None:
    found = sources(package, {"Host.later": {"9999.0": "0" * 16}, "free": {"0.1": digest_of(package, "free")}})
    found.check()
    assert list(found.expected(HERE)) == [f"{package.name}.work:free"]
    assert len(found.expected("9999.0.dev1")) == 2


def test_a_host_without_a_folder(package: Path) -> None:
    found = Sources(toy_host.host("no_such_package"), sources(package, {}).table)
    with pytest.raises(ModuleNotFoundError, match="no_such_package is not importable"):
        found.folder()


def test_an_editable_installation_is_found_by_its_own_finder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as importable:
        package = toy_host.write_package(tmp_path, importable)

    class Finder:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
            where = package / "__init__.py"
            return importlib.util.spec_from_file_location(name, where) if name == package.name else None

    found = sources(package, {"free": {"0.1": digest_of(package, "free")}})
    with pytest.raises(ModuleNotFoundError):
        found.folder()
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    assert found.folder() == package
    found.check()


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (("return x + 1", "return x + 1  # a comment"), True),
        (("What the host computes.", "Other words."), True),
        (("(self, x)", "(self, x: int) -> int"), True),
        (("return x + 1", "return (x\n            + 1)"), True),
        (("x + 1", "x + 2"), False),
        (("x + 1", "x - 1"), False),
        (("(self, x)", "(self, x=0)"), False),
    ],
)
def test_a_fingerprint_follows_code_and_not_layout(change: tuple[str, str], same: bool, tmp_path: Path) -> None:
    first, second = tmp_path / "a.py", tmp_path / "b.py"
    first.write_text(toy_host.SOURCE)
    second.write_text(toy_host.SOURCE.replace(*change))
    digests = {fingerprint_in_file(path, "Host.answer") for path in (first, second)}
    assert len(digests) == (1 if same else 2)


def test_the_fingerprint_of_a_function_is_that_of_its_file(package: Path) -> None:
    work: Any = importlib.import_module(f"{package.name}.work")
    assert fingerprint(work.Host.answer) == digest_of(package, "Host.answer")
    assert fingerprint_in_file(package / "work.py", "Host.absent") is None


def test_an_unpacked_package_is_read_without_its_name(package: Path) -> None:
    names = ("toy.work:free", "toy.gone:free")
    assert fingerprints_in_folder(package, names) == {names[0]: digest_of(package, "free"), names[1]: None}


def test_a_fingerprint_does_not_depend_on_the_python_version(tmp_path: Path) -> None:
    # The table of host fingerprints is shared by all of them.
    path = tmp_path / "f.py"
    path.write_text(
        textwrap.dedent("def f(a, *, b=f'{1}x', **k):\n    return [a[1:2, ...] for _ in k if b] or {**k}\n")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fingerprint_in_file(path, "f") == "99533f53da58c860"
