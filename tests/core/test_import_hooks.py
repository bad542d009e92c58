"""Hooks that go in when the host imports its modules, and the reasons for which a process is refused."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kl_plugins.adapters.versions import UnsupportedHostError
from kl_plugins.patches.engine.fingerprint import fingerprint_in_file
from kl_plugins.patches.engine.on_import import ImportHooks
from kl_plugins.patches.engine.patch import Patch, PatchSet
from tests.support.core import toy_host


def double(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    return 2 * wrapped(*args, **kwargs)


class Toy:
    """A host on disk, its table of hooks, and what the engine is given."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.early = toy_host.write(folder, monkeypatch), toy_host.write(folder, monkeypatch)
        self.host, self.name = toy_host.host(self.path.stem), self.path.stem
        self.digest = str(fingerprint_in_file(self.path, "Host.answer"))
        self.table = ModuleType(f"kl_plugins.patches.{self.name}.hooks")
        self.put("Host.answer", self.digest)
        monkeypatch.setitem(sys.modules, self.table.__name__, self.table)
        self.seen: list[str] = []
        early = {self.early.stem: lambda module: self.seen.append(module.__name__)}
        self.hooks = ImportHooks(self.host, folder / self.name, (self.name,), early)

    def put(self, qualname: str, digest: str) -> None:
        patch = Patch(self.name, qualname, double, {"1": digest})
        self.table.PATCHES = PatchSet(self.host, (patch,), check_on_use=True)  # type: ignore[attr-defined]

    def imported(self) -> Any:
        return importlib.import_module(self.name)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    return Toy(tmp_path, monkeypatch)


def test_a_hook_waits_for_its_module(toy: Toy) -> None:
    toy.hooks.attach()
    toy.hooks.attach()
    assert not toy.hooks.patches.active
    assert toy.imported().Host().answer(1) == 4
    toy.hooks.check_process()
    toy.hooks.detach()
    assert toy.imported().Host().answer(1) == 2


def test_a_hook_goes_at_once_into_a_module_that_is_there(toy: Toy) -> None:
    module = toy.imported()
    toy.hooks.attach()
    assert module.Host().answer(1) == 4
    toy.hooks.detach()
    toy.hooks.detach()
    assert module.Host().answer(1) == 2


def test_the_table_is_loaded_with_the_first_module_of_the_host(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, toy.table.__name__, None)
    toy.hooks.attach()
    assert not toy.hooks.failures
    toy.imported()
    assert len(toy.hooks.failures) == 1


def test_detaching_before_the_import_leaves_the_host_alone(toy: Toy) -> None:
    toy.hooks.attach()
    toy.hooks.detach()
    assert toy.imported().Host().answer(1) == 2


def test_attaching_again_after_detaching(toy: Toy) -> None:
    module = toy.imported()
    for _ in range(2):
        toy.hooks.attach()
        assert module.Host().answer(1) == 4
        toy.hooks.detach()
        assert module.Host().answer(1) == 2


def test_an_early_hook_needs_no_table(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, toy.table.__name__, None)
    toy.hooks.attach()
    toy.hooks.attach()
    importlib.import_module(toy.early.stem)
    assert toy.seen == [toy.early.stem]
    assert not toy.hooks.failures


def test_a_failure_stops_no_import_but_every_use_of_a_spec(toy: Toy, caplog: pytest.LogCaptureFixture) -> None:
    toy.put("Host.gone", toy.digest)
    toy.hooks.attach()
    assert toy.imported().Host().answer(1) == 2
    assert "a KL spec will be refused" in caplog.text
    with pytest.raises(
        UnsupportedHostError, match=r"could not attach to Toy .*AttributeError.*gone.*kl-plugins doctor"
    ):
        toy.hooks.check_process()
    toy.hooks.detach()
    assert not toy.hooks.failures


def test_a_process_with_changed_source_is_refused(toy: Toy) -> None:
    toy.put("Host.answer", "0" * 16)
    toy.hooks.attach()
    toy.imported()
    with pytest.raises(UnsupportedHostError, match=r"Host\.answer of wrapt .* is not the code"):
        toy.hooks.check_process()
    toy.hooks.detach()


def test_a_process_that_lost_its_hooks_is_refused(toy: Toy) -> None:
    toy.imported()
    with pytest.raises(UnsupportedHostError, match="has no hook in this process"):
        toy.hooks.check_process()


def test_a_process_with_another_version_is_refused(toy: Toy) -> None:
    hooks = ImportHooks(toy_host.host(toy.name, "<0.1"), toy.hooks.folder, ())
    with pytest.raises(UnsupportedHostError, match=r"wrapt .*<0\.1"):
        hooks.check_process()


def test_the_sources_are_those_of_the_hosts_folder(toy: Toy) -> None:
    toy.hooks.folder.mkdir()
    table = {f"{toy.name}.work:free": {"0.1": "0" * 16}}
    (toy.hooks.folder / "fingerprints.json").write_text(json.dumps(table))
    assert toy.hooks.sources.checked == table
    assert toy.hooks.sources.host is toy.host


def test_a_summary_is_that_of_the_table(toy: Toy) -> None:
    toy.imported()
    assert toy.hooks.summary() == toy.hooks.patches.summary()
    assert toy.hooks.summary(functions=("Host.answer",))[0] == ("Host.answer",)
    assert toy.hooks.summary(functions=("another",))[0] == ()
