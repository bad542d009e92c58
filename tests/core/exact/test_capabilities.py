"""The accuracy cases once per instruction set that torch has code for and this processor can run.

Torch chooses its instruction set when it starts, so each one is measured by a process of its own. The worst ratio of
error to promise of each is printed at the end of pytest's output.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.core.exact.accuracy import CASES, ROOM, Check, worst

ROOT = Path(__file__).parents[3]


def capabilities() -> list[str]:
    """Names for ATEN_CPU_CAPABILITY. Torch does not check them: one that the processor lacks ends the process."""
    names = ["default"]
    if torch.cpu._is_avx2_supported():
        names.append("avx2")
        if torch.cpu._is_avx512_supported():
            names.append("avx512")
    return names


@pytest.mark.parametrize("capability", capabilities())
def test_measured_errors_are_below_half_of_what_is_promised(
    capability: str, accuracy_lines: list[str], tmp_path: Path
) -> None:
    # What torch compiles for one instruction set it takes from its cache for another one too.
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.core.exact.accuracy"],
        cwd=ROOT,
        env={**os.environ, **cache, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["capability"] in (capability, "no avx")  # the name of default in some versions of torch
    assert found["checks"] == 5 * len(CASES)
    checks = [Check(*check) for check in found["worst"].values()]
    assert len(checks) == 5
    accuracy_lines += [f"{capability}: {check.kind}: {check.ratio:.2f} ({check.case})" for check in checks]
    for check in checks:
        assert check.error < ROOM * check.promise, f"{check}: {check.ratio:.2f} of the promise under {capability}"


def test_the_worst_check_of_each_kind_is_found_and_nan_is_worse_than_any() -> None:
    checks = [Check("a", "KL", 1e-6, 1e-5), Check("b", "KL", 4e-6, 1e-5), Check("c", "KL", 5e-6, 1e-4)]
    other, lost = Check("d", "log-prob", 1.0, 2.0), Check("e", "KL", float("nan"), 1e-5)
    assert worst([*checks, other])["worst"] == {"KL": checks[1], "log-prob": other}
    assert worst([*checks, lost, checks[0]])["worst"]["KL"] is lost
