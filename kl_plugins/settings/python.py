"""Settings in a Python source: the keyword arguments of the calls that build a config, where they are literals."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

from kl_plugins.settings.values import Settings, Unknown

_COMMAND = re.compile(r"^(\s*)[!%].*")
"""A line of a notebook that is not Python."""


def read_python(text: str, place: str, calls: Sequence[str] = ()) -> Settings:
    """Read the keyword arguments of calls in a Python source. Nothing of the source is run.

    Args:
        text: the source.
        place: the name of the file.
        calls: the last part of the names of the functions to read, for example ``GRPOConfig``; empty: every call and
            every mapping with text keys.

    Returns:
        The settings. A value that is neither a literal nor a name to which the module assigns a literal is unknown.

    Raises:
        SyntaxError: the text is not Python.
    """
    tree = ast.parse(text)
    found = Settings()
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.imports |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.imports.add(node.module.split(".")[0])
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            value = _value(node.value, {})
            if not isinstance(value, Unknown):
                names[node.targets[0].id] = value
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (not calls or _name(node.func) in calls):
            for keyword in node.keywords:
                if keyword.arg is not None:
                    found.add(keyword.arg, _value(keyword.value, names), f"{place}:{keyword.value.lineno}")
                elif isinstance(keyword.value, ast.Name) and isinstance(names.get(keyword.value.id), dict):
                    found.add("", names[keyword.value.id], f"{place}:{keyword.value.lineno}")
            found.calls.append(_name(node.func))
        elif isinstance(node, ast.Dict) and not calls:
            value = _value(node, names)
            if isinstance(value, dict) and all(isinstance(key, str) for key in value):
                found.add("", value, f"{place}:{node.lineno}")
    return found


def notebook_source(text: str) -> str:
    """Return the code of a notebook as one Python source. Lines for the notebook's own commands are left out.

    Args:
        text: the notebook's JSON.

    Raises:
        ValueError: the text is not a notebook.
    """
    try:
        cells = json.loads(text)["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a notebook: {error!r}") from error
    lines = [line for source in sources for line in source.splitlines()]
    return "\n".join(_COMMAND.sub(r"\1pass", line) for line in lines)


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _value(node: ast.expr, names: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.Call) and _name(node.func) == "dict" and not node.args:
        return {keyword.arg: _value(keyword.value, names) for keyword in node.keywords if keyword.arg is not None}
    if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
        return {
            key.value: _value(value, names)
            for key, value in zip(node.keys, node.values, strict=True)
            if isinstance(key, ast.Constant)
        }
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return Unknown(ast.unparse(node))
