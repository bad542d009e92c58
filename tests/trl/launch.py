"""Start ``torchrun`` with two CPU processes, bounded in time, and leave none behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT = 240


def torchrun(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m <command>`` in two processes.

    Args:
        command: module and its arguments.
        environment: variables beside the present ones.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", *command]
    process = subprocess.Popen(
        launcher, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"still running after {LIMIT} s:\n{output[-4000:]}") from None
    finally:
        # torchrun stops its workers itself; this is for the case that it was killed.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(launcher, process.returncode, output)
