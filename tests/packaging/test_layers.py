"""Tests of the layers: patches import adapters, adapters import the core, and only a host's own folders import it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = {"kl_plugins": "kl_plugins", "adapters": "kl_plugins.adapters", "patches": "kl_plugins.patches"}
HOSTS = {"trl", "verl", "openrlhf"}
ENTRY_POINT = "kl_plugins.patches.verl.entry"  # the doctor tells users of an older veRL to name it
# These packages are dependencies of hosts. The folders of a host may use them; code that all hosts share may not.
HOST_STACK = {"ray", "transformers", "accelerate", "deepspeed", "vllm", "peft", "datasets", "megatron"}


def imports(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Give the absolute name of everything that `source` imports, inside functions too, types alone included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node.func) in {"import_module", "__import__"}:
            yield from (str(name.value) for name in node.args[:1] if isinstance(name, ast.Constant))


def _called(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Return the imports of a module that its layer does not allow."""
    layer = next(name for name in ("kl_plugins.adapters", "kl_plugins.patches", "kl_plugins") if _within(module, name))
    rest = module.removeprefix(layer).strip(".").split(".")
    host = rest[0] if layer != "kl_plugins" and rest[0] in HOSTS else None
    found = []
    for name in imports(source, module, is_package):
        top = name.split(".")[0]
        wrong = (
            (top in HOSTS and top != host)
            or (top in HOST_STACK and host is None)
            or (layer == "kl_plugins" and (_within(name, "kl_plugins.adapters") or _within(name, "kl_plugins.patches")))
            or (layer == "kl_plugins.adapters" and _within(name, "kl_plugins.patches"))
            or (top in {"adapters", "patches", "tests", "benchmarks"})
            or any(_within(name, f"{face}.{other}") for face in LAYERS.values() for other in HOSTS - {host})
        )
        if wrong:
            found.append(f"{module} imports {name}")
    return found


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def modules() -> Iterator[tuple[Path, str]]:
    """Yield every file that is installed, with its module name."""
    for folder, package in LAYERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield path, ".".join([package, *(part for part in parts if part != "__init__")])


def test_no_import_crosses_a_wall() -> None:
    found = [
        text for path, module in modules() for text in violations(path.read_text(), module, path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kl_plugins.term", "import trl"),
        ("kl_plugins.term", "def f():\n    from transformers import Trainer"),
        ("kl_plugins.term", "from kl_plugins.adapters.trl import GRPOTrainer"),
        ("kl_plugins.cli.app", "from ..patches import patch"),
        ("kl_plugins.cli.app", "from .. import adapters"),
        ("kl_plugins.cli.app", "import importlib\nimportlib.import_module('kl_plugins.patches.trl')"),
        ("kl_plugins.adapters.trl.loss", "from kl_plugins.patches.trl import attach"),
        ("kl_plugins.adapters.trl.loss", "def attach():\n    from kl_plugins.patches.trl import attach"),
        ("kl_plugins.adapters.trl.loss", "class A:\n    from kl_plugins.patches import trl"),
        ("kl_plugins.adapters.trl.loss", "import verl"),
        ("kl_plugins.adapters.trl.loss", "from ..verl import loss"),
        ("kl_plugins.adapters.common", "import accelerate"),
        ("kl_plugins.patches.engine.patch", "import trl.trainer"),
        ("kl_plugins.patches.trl.attach", "from patches import patch"),
    ],
)
def test_crossings_are_seen(module: str, source: str) -> None:
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kl_plugins.term", "import torch\nfrom .spec import KLSpec"),
        ("kl_plugins.adapters.trl.loss", "import trl, transformers\nfrom kl_plugins import kl_term"),
        (
            "kl_plugins.patches.trl.attach",
            "from ...adapters.trl import loss\nfrom ..engine.patch import Patch\nimport trl",
        ),
    ],
)
def test_allowed_imports_are_not_called_crossings(module: str, source: str) -> None:
    assert not violations(source, module)


def test_one_module_of_the_adapters_names_the_patches() -> None:
    """Docstrings may speak of them; code builds the name of a package of patches in one place alone."""
    naming = set()
    for path in sorted((ROOT / "adapters").rglob("*.py")):
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        values = [node.value for node in texts if id(node) not in docstrings]
        if any("kl_plugins.patches" in value and value != ENTRY_POINT for value in values):
            naming.add(str(path.relative_to(ROOT / "adapters")))
    assert naming == {"base.py"}
