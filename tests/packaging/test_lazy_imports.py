"""Tests that commands which need no tensors and no host import neither torch nor a host, so that they start quickly."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "numpy", "trl", "transformers", "verl", "openrlhf", "ray", "vllm")
RUN_CLI = """
try:
    from kl_plugins.cli.app import main
    main()
except SystemExit as stop:
    status = stop.code
"""


def heavy_imports(program: str, *arguments: str, cwd: Path) -> tuple[list[str], object]:
    """Run a program in a new interpreter and return the heavy modules that it loaded, and its ``status``."""
    report = f"import json, sys; loaded = [name for name in {HEAVY} if name in sys.modules]"
    report += "; print(json.dumps([loaded, status]), file=sys.__stderr__)"
    script = f"status = 0\n{program}\n{report}"
    result = subprocess.run([sys.executable, "-c", script, *arguments], cwd=cwd, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    loaded, status = json.loads(result.stderr.splitlines()[-1])
    return loaded, status


def test_import_loads_nothing_heavy(tmp_path: Path) -> None:
    assert heavy_imports("import kl_plugins", cwd=tmp_path)[0] == []


def test_tensor_functions_load_torch(tmp_path: Path) -> None:
    assert "torch" in heavy_imports("from kl_plugins import kl_term", cwd=tmp_path)[0]


@pytest.mark.parametrize(
    ("arguments", "fails"),
    [
        (["list"], False),
        (["list", "--json"], False),
        (["explain", "k2@loss/is:token"], False),
        (["explain", "k2@los"], True),
        (["explain", "--host", "trl", "beta=0.1"], False),
        (["explain", "--host", "trl", "beta=0.1", "kl=exact@loss", "--suggest"], False),
        (["explain", "--host", "verl", "actor_rollout_ref.actor.use_kl_loss=True"], False),
        (["explain", "--host", "openrlhf", "--algo.kl.estimator", "default", "--algo.kl.use_loss"], False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_line_loads_nothing_heavy(arguments: list[str], fails: bool, tmp_path: Path) -> None:
    loaded, status = heavy_imports(RUN_CLI, *arguments, cwd=tmp_path)
    assert loaded == []
    assert bool(status) is fails
