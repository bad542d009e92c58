"""Fingerprints of host functions: they change with the code, not with its comments or layout."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def fingerprint(function: Callable[..., Any]) -> str:
    """Digest of a function's code; comments, layout, docstrings and type hints of arguments do not matter.

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
    """The same digest from a source file, without importing it.

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
    """The digests of functions in an unpacked package, without importing it.

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
