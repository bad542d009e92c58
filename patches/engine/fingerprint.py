"""Fingerprints of host functions, and the table of those that were checked.

A fingerprint changes with the code of a function, and not with its comments or its layout. The table of a host is data:
``patches/<host>/fingerprints.json``.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import inspect
import json
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.version import Version

from kl_plugins.adapters.versions import refuse_untested
from kl_plugins.hosts import Host


def fingerprint(function: Callable[..., Any]) -> str:
    """Compute the digest of a function's code; comments, layout, docstrings and type hints of arguments do not matter.

    Decorators that keep ``__wrapped__`` are looked through: the digest is of what the host wrote.

    Args:
        function: a plain function or a wrapper of one.

    Returns:
        16 hexadecimal digits: enough against accident; malice is not the concern.

    Raises:
        OSError: the source is not available (a compiled or generated function).
    """
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    return _digest(ast.parse(source).body[0])


def fingerprint_in_file(path: Path, qualname: str) -> str | None:
    """Compute the same digest from a source file, without importing it.

    Args:
        path: a module's source.
        qualname: ``Class.method`` or ``function`` in it.

    Returns:
        16 hexadecimal digits, or None where the file defines no such function.
    """
    body = ast.parse(path.read_text(encoding="utf-8")).body
    node: ast.AST | None = None
    for name in qualname.split("."):
        node = next((n for n in body if isinstance(n, _DEFINITIONS) and n.name == name), None)
        if node is None:
            return None
        body = node.body
    return _digest(node)


def fingerprints_in_folder(folder: Path, names: Iterable[str]) -> dict[str, str | None]:
    """Compute the digests of functions in an unpacked package, without importing it.

    Args:
        folder: the package's folder, of any version.
        names: ``module:qualname`` of each function, the module with the package's name.

    Returns:
        Digest by name, None where that version lacks the function.
    """
    found: dict[str, str | None] = {}
    for name in names:
        module, qualname = name.split(":")
        path = folder.joinpath(*module.split(".")[1:]).with_suffix(".py")
        found[name] = fingerprint_in_file(path, qualname) if path.exists() else None
    return found


@dataclass(frozen=True)
class Sources:
    """The source files of a host as they are installed, compared with those that were checked. Imports no host.

    Attributes:
        host: the host.
        table: JSON file with the checked fingerprints: by ``module:qualname``, by the first version that has each.
    """

    host: Host
    table: Path

    @cached_property
    def checked(self) -> dict[str, dict[str, str]]:
        """Every checked fingerprint, by function and version."""
        found: dict[str, dict[str, str]] = json.loads(self.table.read_text(encoding="utf-8"))
        return found

    def expected(self, version: str) -> dict[str, dict[str, str]]:
        """Return the part of the table whose functions a version of the host has.

        Args:
            version: of the host.
        """
        return {
            name: digests
            for name, digests in self.checked.items()
            if min(map(Version, digests)).release <= Version(version).release
        }

    @cached_property
    def installed(self) -> dict[str, str | None]:
        """The fingerprints as installed; None where the function is gone.

        Raises:
            ModuleNotFoundError: the host's package folder is not importable.
        """
        return fingerprints_in_folder(self.folder(), self.checked)

    def folder(self) -> Path:
        """Find the folder of the host's package, without importing it.

        Raises:
            ModuleNotFoundError: there is none.
        """
        package = self.host.packages[0]
        # Editable installations may be found by a finder of their own only.
        spec = PathFinder.find_spec(package) or find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"kl-plugins: the package folder of {package} is not importable; reinstall it")
        return Path(next(iter(spec.submodule_search_locations)))

    def changed(self) -> Iterator[tuple[str, str | None]]:
        """Give the functions whose installed source is not a checked one, with its fingerprint."""
        for name, digests in self.expected(importlib.metadata.version(self.host.distribution)).items():
            if self.installed[name] not in digests.values():
                yield name, self.installed[name]

    def check(self) -> None:
        """Raise where the host's files are not those that were checked, whether this process imports them or not.

        Raises:
            UnsupportedHostError: a function that is wrapped in some process has changed.
        """
        for name, digest in self.changed():
            refuse_untested(
                f"{name.replace(':', '.')} of {self.host.distribution} "
                f"{importlib.metadata.version(self.host.distribution)} is not the code that kl-plugins was checked "
                f"with (fingerprint {digest}); it was edited, or this is another version"
            )


def _digest(node: ast.AST | None) -> str:
    return hashlib.sha256(_canonical(node).encode()).hexdigest()[:16]


def _canonical(node: object) -> str:
    """Text of a syntax tree that is the same in every Python version.

    ``ast.dump`` is not: newer versions leave empty fields out and add ``type_params``.
    """
    if isinstance(node, ast.AST):
        fields = [(name, value) for name, value in ast.iter_fields(node) if name not in _IGNORED_FIELDS]
        if (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and ast.get_docstring(node) is not None
        ):
            fields = [(name, value[1:] if name == "body" else value) for name, value in fields]
        shown = ",".join(f"{name}={_canonical(value)}" for name, value in fields if value not in (None, []))
        return f"{type(node).__name__}({shown})"
    if isinstance(node, list):
        return f"[{','.join(map(_canonical, node))}]"
    return repr(node)


_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_IGNORED_FIELDS = frozenset({"ctx", "kind", "type_comment", "type_params", "annotation", "returns"})
