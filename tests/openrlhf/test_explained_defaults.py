"""The defaults that ``kl-plugins explain --host openrlhf`` assumes are those of the installed OpenRLHF's parser."""

from __future__ import annotations

import ast
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.version import Version

from kl_plugins.adapters.openrlhf.explained.defaults import defaults


def flags() -> dict[str, Any]:
    """The flags of OpenRLHF's program and their defaults, read from its source: its parser exists in a script alone."""
    spec = find_spec("openrlhf")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / "cli" / "train_ppo_ray.py").read_text("utf-8"))
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            name, *_ = node.args
            if isinstance(name, ast.Constant):
                options = {keyword.arg: keyword.value for keyword in node.keywords}
                default = options.get("default")
                found[str(name.value).removeprefix("--")] = (
                    default.value if isinstance(default, ast.Constant) else default and ast.unparse(default)
                )
    return found


def test_defaults_are_openrlhfs_own() -> None:
    real = flags()
    for key, assumed in defaults(Version(version("openrlhf"))).items():
        assert key in real, key
        assert real[key] == assumed, key
