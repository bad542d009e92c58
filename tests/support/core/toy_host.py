"""A host for tests of the patch engine: a module written on the spot, under a name that no other test uses."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

from kl_plugins.hosts import Host

SOURCE = """
class Host:
    def answer(self, x):
        '''What the host computes.'''
        return x + 1

    def other(self):
        return 0


def free(x):
    return x - 1
"""

_numbers = count()


def host(package: str, supported: str = ">=0", distribution: str = "wrapt") -> Host:
    """What the engine is told about a host.

    Args:
        package: the module.
        supported: PEP 440 specifier.
        distribution: one that is installed, whose version stands for the host's.
    """
    return Host("toy", distribution, (package,), supported, (), {}, "no.adapter", title="Toy")


def write(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str = SOURCE) -> Path:
    """Write a module that can be imported until the test ends; return its file.

    Args:
        folder: where.
        monkeypatch: of the test.
        source: text of the module.
    """
    path = folder / f"toy_host_{next(_numbers)}.py"
    path.write_text(source)
    monkeypatch.syspath_prepend(folder)
    return path


def write_package(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str = SOURCE) -> Path:
    """Write a package with one module, ``work``; return its folder. The arguments are those of :func:`write`."""
    package = folder / f"toy_package_{next(_numbers)}"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "work.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    return package
