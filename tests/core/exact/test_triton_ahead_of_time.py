"""The Triton kernels compile for GPUs that are not here, keep to registers, and read ahead."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
ARCHES = ("80", "90")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or platform.system() != "Linux", reason="Triton is not installed"
)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every variant, compiled anew in a process without interpreter and without a cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-m", "tests.core.exact.ahead_of_time", *ARCHES],
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))},
        text=True,
        capture_output=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_no_kernel_spills_or_uses_the_stack(reports: list[dict[str, Any]]) -> None:
    ours = [report for report in reports if report["variant"] != "too large"]
    assert len(ours) == 2 * 3 * 4
    for report in ours:
        assert (report["STACK"], report["LOCAL"], report["spilling"]) == (0, 0, 0), report
        # At 4 warps, four programs on a multiprocessor; three where policy and reference have different caps.
        assert report["REG"] <= (168 if "unlike" in report["variant"] else 128), report


def test_a_kernel_that_spills_would_be_seen(reports: list[dict[str, Any]]) -> None:
    (large,) = (report for report in reports if report["variant"] == "too large")
    assert large["STACK"] > 0
    assert large["spilling"] > 0


def test_every_kernel_loads_16_bytes_at_once(reports: list[dict[str, Any]]) -> None:
    """One thread's share of a block is contiguous, so the forward kernels add it up without asking other threads."""
    # Where steps are loaded ahead, the load goes to shared memory instead.
    assert all(report["wide_loads"] + report["loads_ahead"] > 0 for report in reports)
