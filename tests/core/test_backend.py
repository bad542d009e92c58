"""The choice between the eager and the compiled path, and what is said when there is no choice."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kl_plugins.kernels import backend
from kl_plugins.kernels.backend import COMPILE_ABOVE, ENVIRONMENT_VARIABLE, BackendError, chosen_backend


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.delenv("CXX", raising=False)
    for cached in (backend.backend_status, backend.say_once):
        cached.cache_clear()
    yield
    for cached in (backend.backend_status, backend.say_once):
        cached.cache_clear()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "g++").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.usefixtures("a_compiler")
def test_size_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen_backend(COMPILE_ABOVE - 1, "cpu") == "eager"
    assert chosen_backend(COMPILE_ABOVE, "cpu") == "compiled"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "eager")
    assert chosen_backend(COMPILE_ABOVE, "cpu") == "eager"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "compiled")
    assert chosen_backend(1, "cpu") == "compiled"


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_eager_path_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="kl_plugins"):
        assert chosen_backend(1, "cpu") == "eager"
        assert not caplog.records
        assert [chosen_backend(COMPILE_ABOVE, "cpu") for _ in range(3)] == ["eager"] * 3
    assert len(caplog.records) == 1
    assert "no C++ compiler found" in caplog.text
    assert "eager" in caplog.text


@pytest.mark.usefixtures("no_compiler")
def test_a_backend_asked_for_by_name_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "compiled")
    with pytest.raises(BackendError, match="no C\\+\\+ compiler found"):
        chosen_backend(1, "cpu")
    monkeypatch.setenv("CXX", "icpx")
    backend.backend_status.cache_clear()
    with pytest.raises(BackendError, match="looked for icpx"):
        chosen_backend(1, "cpu")


@pytest.mark.parametrize("name", ["Eager", "triton", "auto "])
def test_unknown_backends(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, name)
    with pytest.raises(BackendError, match="expected one of auto, eager, compiled"):
        chosen_backend(1, "cpu")


BROKEN = """
import logging, os, sys, torch
logging.basicConfig(level=logging.WARNING, format="%(message)s")
from kl_plugins import KLSpec, kl_term
from kl_plugins.kernels import backend
logp = torch.zeros(1, backend.COMPILE_ABOVE)
for _ in range(3):
    value = kl_term(KLSpec.parse("k2@loss"), logp, logp - 2, torch.ones_like(logp)).value
    print(value[0, 0].item(), os.path.getsize(sys.argv[1]))
"""


@pytest.mark.full
def test_a_broken_compiler_costs_one_attempt_and_one_warning(tmp_path: Path) -> None:
    broken, attempts = tmp_path / "g++", tmp_path / "attempts"
    broken.write_text(f"#!/bin/sh\necho $@ >> {attempts}\nexit 1\n")
    broken.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", BROKEN, str(attempts)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert len(set(lines)) == 1, "a later call tried the broken compiler again"
    value, attempted = lines[0].split()
    assert (value, int(attempted) > 0) == ("2.0", True)
    assert done.stderr.count("kl-plugins: eager path: torch.compile failed") == 1
    by_name = {**env, ENVIRONMENT_VARIABLE: "compiled"}
    done = subprocess.run(command, env=by_name, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert "eager path" not in done.stderr
