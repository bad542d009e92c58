"""The examples in docs/examples which a user copies, run as they stand at a tiny size, on the CPU platform."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import examples
from tests.support.examples import EXAMPLES
from tests.support.verl.main_ppo import SETTINGS, end_session
from tests.support.verl.ray_support import ENVIRONMENT, SINCE_0_9

RECEIPT = r"kl-plugins: k2@loss/is:token/floor:0\.5 active in veRL \S+, rank (\d+) of (\d+) .*behaviour sampler"
TINY = {
    "ENGINE": "transformers_cpu",
    "GPUS": "1",
    "STEPS": "2",
    "PROMPTS": "4",
    "RESPONSES": "2",
    "LENGTH": "8",
    "MICRO": "4",
}
# What the example leaves to the user's GPUs: attention, precision, memory. Its other keys are set in the example alone.
CPU_ONLY = (
    "model.", "attn_implementation", "fsdp", "torch_compile", "strategy", "trainer.device", "transfer_queue",
    "dataloader", "filter", "num_workers",
)  # fmt: skip

LOGGER = 'trainer.logger=["console","file"]'

pytestmark = pytest.mark.timeout(900)


def for_the_cpu() -> list[str]:
    """Overrides at the end of an example's command line."""
    found = [f"{key}={value}" for key, value in SETTINGS.items() if any(part in key for part in CPU_ONLY)]
    return [*(text for text in found if not text.endswith("=None")), "trainer.save_freq=-1", "data.val_batch_size=4"]


def variables(folder: Path, **changes: str) -> dict[str, str]:
    """The environment of a command: programs of this interpreter come first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    log = {"VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl")}
    return {**os.environ, **ENVIRONMENT, "PATH": path, **TINY, **log, **changes}


def execute(script: str, folder: Path, overrides: list[str], environment: dict[str, str]) -> str:
    """Run a script of the examples for this host until its end."""
    path = f"verl/{script}"
    return examples.execute(path, overrides, folder, environment, seconds=600, end_session=end_session)


def assert_trained(output: str, folder: Path, ranks: int = 1) -> None:
    """Every rank gave its receipt, and two steps ran under the regulariser."""
    assert set(re.findall(RECEIPT, output)) == {(str(rank), str(ranks)) for rank in range(ranks)}, output[-6000:]
    steps = [json.loads(line)["data"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["kl/active"] for step in steps] == [1, 1]
    assert all(step["kl/beta"] == 0.001 for step in steps)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """What the examples' own program writes."""
    program = [sys.executable, str(EXAMPLES / "data.py"), "--out", str(tmp_path / "data"), "--rows", "16"]
    subprocess.run(program, check=True, timeout=120)
    return tmp_path / "data" / "verl"


def paths(assets: Path, data: Path, folder: Path) -> dict[str, str]:
    return {"MODEL": str(assets / "model"), "DATA": str(data), "OUT": str(folder / "out")}


@contextmanager
def short_folder() -> Iterator[Path]:
    """For Ray, whose sockets need a short path."""
    folder = tempfile.mkdtemp(prefix="klp")
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_port(port: int, seconds: float = 120) -> None:
    """Return as soon as a process listens."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise TimeoutError(f"no process listens on port {port}")


def test_one_node(assets, data, tmp_path):
    with short_folder() as ray_folder:
        room = {"num_cpus": 16, "num_gpus": 1, "include_dashboard": False, "object_store_memory": 200_000_000}
        room |= {"_temp_dir": ray_folder, **({} if SINCE_0_9 else {"resources.cpu": 1})}
        ray = [f"++ray_kwargs.ray_init.{key}={value}" for key, value in room.items()]
        environment = variables(tmp_path, **paths(assets, data, tmp_path))
        output = execute("one_node.sh", tmp_path, [*for_the_cpu(), *ray, LOGGER], environment)
    assert_trained(output, tmp_path)


@contextmanager
def started_cluster(environment: dict[str, str], second: bool) -> Iterator[str]:
    """The address of the dashboard of a Ray cluster, started as the example says; gone at the end."""
    with short_folder() as folder:
        port, dashboard = free_port(), free_port()
        room = ["--num-cpus=16", "--num-gpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
        room += [] if SINCE_0_9 else ['--resources={"cpu": 1}']
        head = ["ray", "start", "--head", f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}"]
        head += ["--node-ip-address=127.0.0.1", "--dashboard-agent-listen-port=0", "--dashboard-agent-grpc-port=0"]
        head += [f"--ray-client-server-port={free_port()}", "--block"]
        nodes = [subprocess.Popen([*head, *room], env=environment, start_new_session=True)]
        try:
            wait_for_port(dashboard)
            if second:
                join = ["ray", "start", f"--address=127.0.0.1:{port}", "--node-ip-address=127.0.0.2", "--block"]
                join += ["--dashboard-agent-listen-port=0", "--dashboard-agent-grpc-port=0"]
                nodes.append(subprocess.Popen([*join, *room], env=environment, start_new_session=True))
            yield f"http://127.0.0.1:{dashboard}"
        finally:
            for node in reversed(nodes):
                end_session(node.pid)
                node.wait()


@pytest.mark.full
@pytest.mark.parametrize("nodes", [1, 2])
def test_ray_cluster(nodes, assets, data, tmp_path):
    # The cluster's nodes have this environment, and so have the job's processes.
    # Newer Ray asks for a token where this user has one; the test's clusters have a token of their own.
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = variables(tmp_path, **paths(assets, data, tmp_path), **token)
    with started_cluster(environment, second=nodes == 2) as address:
        changes = {"ADDRESS": address, "NODES": str(nodes), "MICRO": "2"}
        settings = [*for_the_cpu(), "ray_kwargs.ray_init.num_cpus=null", LOGGER]
        output = execute("ray_cluster.sh", tmp_path, settings, environment | changes)
    assert_trained(output, tmp_path, ranks=nodes)
    assert "Job 'raysubmit_" in output
