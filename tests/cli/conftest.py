"""The command line in a fresh interpreter, as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


def run_cli(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``python -m kl_plugins`` and capture what it says."""
    clean = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR", "NO_COLOR")}
    return subprocess.run(
        [sys.executable, "-m", "kl_plugins", *arguments],
        env={**clean, **(env or {})},
        stdin=subprocess.DEVNULL,
        text=True,
        capture_output=True,
        timeout=300,
    )


def words(text: str) -> str:
    """Text without its line breaks: where lines wrap is no promise."""
    return " ".join(text.split())


def document(result: subprocess.CompletedProcess[str]) -> Any:
    """The one JSON document on standard output."""
    return json.loads(result.stdout)


@pytest.fixture
def register(tmp_path: Path) -> Callable[[str, str, str], dict[str, str]]:
    """Install a distribution with one entry point on a path of its own; returns the environment that sees it."""

    def install(group: str, entry: str, source: str) -> dict[str, str]:
        name = entry.partition("=")[0].strip()
        module = entry.partition("=")[2].partition(":")[0].strip()
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"third_party_{name}-3.2.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: third-party-{name}\nVersion: 3.2.1\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")
        inherited = os.environ.get("PYTHONPATH")
        return {"PYTHONPATH": os.pathsep.join([str(tmp_path), *([inherited] if inherited else [])])}

    return install
