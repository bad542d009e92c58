"""Reads the messages of refusals and errors from source files, without importing these files.

A message is a text that is raised, or that is yielded by a function which collects problems. A placeholder is filled
if it is a constant of the module or of a module that it imports from, or a joined tuple of constants. Any other
placeholder is shown by the name of its variable, as in ``<temperature>``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"kl_plugins.adapters": "adapters", "kl_plugins.patches": "patches", "kl_plugins": "kl_plugins"}


@dataclass(frozen=True)
class Message:
    """One message of a source file.

    Attributes:
        file: path of the source file below the repository.
        function: name of the function that raises or yields the message.
        text: the message, with its placeholders filled or named.
    """

    file: str
    function: str
    text: str


def messages_in(file: str) -> Iterator[Message]:
    """Yield every message of a file, in the order of its lines.

    Args:
        file: path of the source file below the repository.
    """
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in _own_nodes(function):
            text = _text_of(node, function, file)
            if text is not None and " " in text:
                yield Message(file, function.name, text)


def _own_nodes(function: ast.FunctionDef) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, ast.FunctionDef):
            yield child
            yield from (node for node in ast.walk(child))


def _text_of(node: ast.AST, function: ast.FunctionDef, file: str) -> str | None:
    value: ast.expr | None = None
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
        value = node.exc.args[0]
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Yield):
        value = node.value.value
    elif isinstance(node, ast.Return) and isinstance(node.value, ast.Call) and _is_error(node.value):
        value = node.value.args[0]
    elif isinstance(node, ast.Return) and function.name == "problem":
        value = node.value
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in _CALLS:
        value = node.args[0] if node.args else None
    if not isinstance(value, ast.Constant | ast.JoinedStr | ast.BinOp):
        return None
    return _rendered(value, constants(file))


def _is_error(call: ast.Call) -> bool:
    """Return whether a call makes an exception, which another function then raises."""
    return bool(call.args) and isinstance(call.func, ast.Name) and call.func.id.endswith("Error")


_CALLS = {"refuse", "refuse_untested"}


def _rendered(value: ast.expr, known: Mapping[str, object]) -> str | None:
    if isinstance(value, ast.Constant):
        return value.value if isinstance(value.value, str) else None
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        left, right = _rendered(value.left, known), _rendered(value.right, known)
        return None if left is None or right is None else left + right
    if not isinstance(value, ast.JoinedStr):
        return None
    parts = []
    for piece in value.values:
        if isinstance(piece, ast.FormattedValue):
            parts.append(_filled(piece.value, known))
        elif isinstance(piece, ast.Constant):
            parts.append(str(piece.value))
    return "".join(parts)


def _filled(value: ast.expr, known: Mapping[str, object]) -> str:
    if isinstance(value, ast.Name) and value.id.isupper():
        found = known.get(value.id)
        if isinstance(found, str | int | float):
            return str(found)
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "join":
        (argument,) = value.args
        found = known.get(argument.id) if isinstance(argument, ast.Name) else None
        if isinstance(found, tuple | list | dict):
            return str(getattr(value.func.value, "value", ", ")).join(map(str, found))
        return f"<{_name(argument)}>"
    return f"<{_name(value)}>"


def _name(value: ast.expr) -> str:
    if isinstance(value, ast.Call) and value.args:
        return _name(value.args[0])
    if isinstance(value, ast.Call):
        return _name(value.func)
    if isinstance(value, ast.GeneratorExp):
        return _name(value.elt)
    if isinstance(value, ast.Attribute):
        return _name(value.value) if value.attr in ("__qualname__", "__name__", "__module__") else value.attr
    if isinstance(value, ast.Name):
        return value.id
    if isinstance(value, ast.Subscript):
        return _name(value.value)
    if isinstance(value, ast.IfExp):
        return f"{_name(value.body)} or {_name(value.orelse)}"
    return str(value.value) if isinstance(value, ast.Constant) else "..."


@cache
def constants(file: str) -> dict[str, object]:
    """Return the literal constants of a module, and those that it imports from other modules of kl-plugins."""
    found: dict[str, object] = {}
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            origin = _file_of(node.module)
            if origin and origin != file:
                theirs = constants(origin)
                found |= {name.name: theirs[name.name] for name in node.names if name.name in theirs}
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name):
                value = node.value
                if isinstance(value, ast.Call) and len(value.args) == 1:  # Version("1.14")
                    value = value.args[0]
                try:
                    found[target.id] = ast.literal_eval(value)
                except ValueError:
                    text = _rendered(value, found) if isinstance(value, ast.JoinedStr) else None
                    if text is not None:
                        found[target.id] = text
    return found


def _file_of(module: str) -> str | None:
    for package, folder in FOLDERS.items():
        if module == package or module.startswith(f"{package}."):
            path = folder + module.removeprefix(package).replace(".", "/")
            for candidate in (f"{path}.py", f"{path}/__init__.py"):
                if (ROOT / candidate).is_file():
                    return candidate
            return None
    return None
