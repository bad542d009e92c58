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
def test_measured_errors_are_below_half_of_what_is_promised(capability: str, accuracy_lines: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.core.exact.accuracy"],
        cwd=ROOT,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["capability"] in (capability, "no avx")  # the name of default in some versions of torch
    assert found["checks"] == 5 * len(CASES)
    checks = {kind: Check(*check) for kind, check in found["worst"].items()}
    accuracy_lines += [f"{capability}: {kind}: {check.ratio:.2f} ({check.name})" for kind, check in checks.items()]
    for check in checks.values():
        assert check.error < ROOM * check.promise, f"{check}: {check.ratio:.2f} of the promise under {capability}"


def test_the_worst_check_is_found_and_nan_is_worse_than_any() -> None:
    checks = [
        Check("a: KL", 1e-6, 1e-5),
        Check("b: KL", 4e-6, 1e-5),
        Check("b: KL", 3e-6, 1e-4),
        Check("c: logp", 1.0, 2.0),
    ]
    assert worst(checks)["worst"] == {
        "KL to 1e-05": checks[1],
        "KL to 0.0001": checks[2],
        "log-probs to 2": checks[3],
    }
    lost = Check("d: KL", float("nan"), 1e-5)
    assert worst([*checks, lost, checks[0]])["worst"]["KL to 1e-05"] is lost
