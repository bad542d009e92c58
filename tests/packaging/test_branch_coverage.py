"""Tests that the measurement of coverage counts processes that no exit function ends, and names what never ran."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / ".ci" / "branch_coverage.py"
MODULE = """
def sign(x):
    if x > 0:
        return 1
    if x < 0:
        return -1
    return 0
"""
CALL = "import sys; sys.path.insert(0, {folder!r}); import module; module.sign({x})"
# A Ray worker ends like this, without Python's exit functions.
KILLED = "; import os, signal, time; time.sleep(5); os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a folder with the three source folders, of which one has a module."""
    for name in ("kl_plugins", "adapters", "patches"):
        (tmp_path / name).mkdir()
    (tmp_path / "adapters" / "module.py").write_text(MODULE)
    return tmp_path


def tool(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), "--root", str(checkout), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=checkout.parent)


def row(checkout: Path) -> list[str]:
    """Return the words of the report about the module: shares and counts, then what never ran."""
    result = tool(checkout, "report")
    assert result.returncode == 0, result.stderr
    table, missing = (line.split() for line in result.stdout.splitlines() if "adapters/module.py" in line)
    return [table[1], table[3], *missing[1:]]


def test_data_of_killed_processes_and_of_all_targets_are_combined(checkout: Path) -> None:
    def call(x: int) -> str:
        return CALL.format(folder=str(checkout / "adapters"), x=x)

    assert tool(checkout, "report").returncode == 1
    # The call is made in a process below the measured one, with another current folder.
    below = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {call(1) + KILLED!r}], cwd={os.sep!r})"
    assert tool(checkout, "run", "first", "-c", below).returncode == 0
    assert row(checkout) == ["1/4", "3/6", "5-7,", "3->5"]
    assert tool(checkout, "run", "second", "-c", call(-1)).returncode == 0
    assert row(checkout) == ["3/4", "5/6", "7,", "5->7"]


def test_the_status_of_the_program_is_kept_and_nothing_is_left_in_the_environment(checkout: Path) -> None:
    program = "import sysconfig; from pathlib import Path\n"
    program += "print(*Path(sysconfig.get_path('purelib')).glob('save_coverage_*.pth')); raise SystemExit(7)"
    command = [sys.executable, str(TOOL), "--root", str(checkout), "run", "target", "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        present = [Path(name) for name in process.communicate(timeout=300)[0].split()]
    assert process.returncode == 7
    (own,) = (path for path in present if path.stem == f"save_coverage_{process.pid}")
    assert not own.exists()
