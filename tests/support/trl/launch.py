"""Start ``torchrun`` or ``accelerate launch`` with two CPU processes, bounded in time, and leave none behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
LIMIT = 240


def torchrun(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m <command>`` in two processes.

    Args:
        command: module and its arguments.
        environment: variables beside the present ones.
    """
    return _launch("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", *command, **environment)


def accelerate_launch(*command: str) -> subprocess.CompletedProcess[str]:
    """The same by ``accelerate launch``, whose ``--cpu`` would start one process only."""
    options = ["--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    port = "--main_process_port=0"  # any free one
    return _launch("accelerate.commands.launch", "--multi_gpu", *options, port, "-m", *command, ACCELERATE_USE_CPU="1")


def _launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", *arguments]
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
