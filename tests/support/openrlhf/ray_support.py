"""Ray for tests: the environment of every process, clusters with ports and folders of their own."""

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CPU_HOST = Path(__file__).parent / "cpu_host"
EXTENSIONS = Path(sys.prefix) / "torch_extensions"
STALE = 300.0
"""Seconds after which a lock of torch's compiler belongs to nobody."""

SEARCH_PATH = os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ["PATH"]])

ENVIRONMENT = {
    "PATH": SEARCH_PATH,  # one ninja for all: a second one of another version compiles everything again
    "PYTHONPATH": str(CPU_HOST),
    "DS_ACCELERATOR": "cpu",
    "TORCH_EXTENSIONS_DIR": str(EXTENSIONS),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "WANDB_MODE": "disabled",
}


def prepare_extensions() -> None:
    """Compile what DeepSpeed else compiles at its first use: once per environment, in no process that may be killed."""
    EXTENSIONS.mkdir(exist_ok=True)
    with (EXTENSIONS / "guard").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        # Whoever is killed while it compiles or loads leaves a lock behind, and then everybody waits for ever. A young
        # one may be that of a process that loads right now, which takes moments once all is compiled.
        prepared = (EXTENSIONS / "prepared").exists()
        for lock in EXTENSIONS.glob("*/lock"):
            if not prepared or time.time() - lock.stat().st_mtime > STALE:
                lock.unlink(missing_ok=True)
        if not prepared:
            program = "from deepspeed.ops.op_builder.cpu import FusedAdamBuilder, ShareMemCommBuilder as Comm\n"
            program += "FusedAdamBuilder().load(); Comm().load()"
            command = [sys.executable, "-W", "ignore", "-c", program]
            subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=True, timeout=900)
            (EXTENSIONS / "prepared").touch()


def end_session(leader: int) -> None:
    """Kill every process of the session that `leader` started; Ray's own processes are in it."""
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and os.getsid(int(folder.name)) == leader:
                os.kill(int(folder.name), signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue


@contextmanager
def local_cluster(*, attached: bool = False, **settings: Any) -> Iterator[None]:
    """A Ray cluster of this process alone, with random ports, and gone with it.

    Args:
        attached: attach kl-plugins, here and in the workers, as ``kl-plugins run`` does.
        settings: over those of ``ray.init`` below.
    """
    import ray

    from tests.support.openrlhf import remote

    prepare_extensions()
    if attached:
        from kl_plugins.adapters.openrlhf import attach, launch

        attach()
        os.environ[launch.VARIABLE] = launch.with_hook(os.environ)
    folder = tempfile.mkdtemp(prefix="klp")  # Ray's sockets need a short path
    defaults = {
        "address": "local",
        "num_cpus": 16,
        "include_dashboard": False,
        "object_store_memory": 150_000_000,
        "_temp_dir": folder,
        "log_to_driver": False,
    }
    try:
        ray.init(**{**defaults, **settings})
    finally:
        if attached:
            del os.environ[launch.VARIABLE]  # of this job alone, not of what its tests start
    ray.cloudpickle.register_pickle_by_value(remote)
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
