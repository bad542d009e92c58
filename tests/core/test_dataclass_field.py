"""A field that is added to a host's dataclass is like one of its own, and leaves no trace when it is taken out."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

from kl_plugins.patches.engine.dataclass_field import FieldPatch
from tests.support.core import toy_host

SOURCE = """
from dataclasses import dataclass, field


@dataclass
class Config:
    size: int = 1
    names: list = field(default_factory=list)

    def __post_init__(self):
        self.seen = getattr(self, "kl", "absent")
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return importlib.import_module(toy_host.write(tmp_path, monkeypatch, SOURCE).stem)


@pytest.fixture
def patch(toy: Any) -> FieldPatch:
    return FieldPatch(toy.__name__, "Config", "kl", str | None, None, "a spec")


def names(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def test_the_field_is_seen_by_whoever_reads_the_dataclass(toy: Any, patch: FieldPatch) -> None:
    patch.apply()
    patch.apply()
    assert patch.active
    assert names(toy.Config) == ["size", "names", "kl"]
    field = dataclasses.fields(toy.Config)[-1]
    assert (field.type, field.default, field.metadata["help"], field.init) == (str | None, None, "a spec", True)
    assert toy.Config.__annotations__["kl"] == str | None
    assert dataclasses.asdict(toy.Config(kl="k2@loss")) == {"size": 1, "names": [], "kl": "k2@loss"}


def test_the_value_is_there_before_post_init(toy: Any, patch: FieldPatch) -> None:
    patch.apply()
    assert toy.Config(kl="k2@loss").seen == "k2@loss"
    assert toy.Config().seen is None
    assert toy.Config(3, ["a"]).names == ["a"]


def test_replace_keeps_it(toy: Any, patch: FieldPatch) -> None:
    patch.apply()
    config = dataclasses.replace(toy.Config(kl="k2@loss"), size=5)
    assert (config.kl, config.size) == ("k2@loss", 5)


def test_undo_leaves_no_trace(toy: Any, patch: FieldPatch) -> None:
    init, annotations = toy.Config.__init__, dict(toy.Config.__annotations__)
    patch.apply()
    patch.undo()
    patch.undo()
    assert not patch.active
    assert toy.Config.__init__ is init
    assert toy.Config.__annotations__ == annotations
    assert names(toy.Config) == ["size", "names"]
    assert toy.Config().seen == "absent"
    with pytest.raises(TypeError, match="kl"):
        toy.Config(kl="k2@loss")


def test_a_subclass_that_is_made_afterwards_gets_it(toy: Any, patch: FieldPatch) -> None:
    early = dataclasses.make_dataclass("Early", [("mine", int, 0)], bases=(toy.Config,))
    patch.apply()
    late: Any = dataclasses.make_dataclass("Late", [("mine", int, 0)], bases=(toy.Config,))
    assert late(kl="k2@loss", mine=2).kl == "k2@loss"
    assert "kl" in inspect.signature(late).parameters
    assert "kl" not in names(early)
    with pytest.raises(TypeError, match="kl"):
        early(kl="k2@loss")


def test_a_field_of_the_hosts_own_is_not_replaced(toy: Any) -> None:
    patch = FieldPatch(toy.__name__, "Config", "size", int, 7, "")
    with pytest.raises(TypeError, match="Config has a field 'size' of its own"):
        patch.apply()
    assert not patch.active
    assert toy.Config().size == 1
