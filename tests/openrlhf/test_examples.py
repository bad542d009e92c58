"""The examples in docs/examples which a user copies, run as they stand at a tiny size, with vLLM on this CPU."""

import ast
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import examples
from tests.support.examples import EXAMPLES
from tests.support.openrlhf.ray_support import ENVIRONMENT, SEARCH_PATH, end_session, free_port, prepare_extensions

RECEIPT = r"kl-plugins: k2@loss/is:token/floor:0\.5 active in OpenRLHF \S+, rank (\d+) of (\d+)"
TINY = {
    "GPUS": "1",
    "SAMPLES": "8",
    "PROMPTS": "4",
    "RESPONSES": "2",
    "PROMPT": "128",
    "LENGTH": "8",
    "MICRO": "4",
    "SLEEP": "",
}
# What the example leaves to the user's GPUs.
FOR_THE_CPU = (
    "--vllm.enforce_eager", "--vllm.gpu_memory_utilization", "0.3", "--vllm.sync_backend", "gloo",
    "--ds.attn_implementation", "eager",
)  # fmt: skip
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

pytestmark = [pytest.mark.full, pytest.mark.timeout(1500)]


@pytest.fixture(scope="session")
def chat_model(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template, which the example applies."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(assets / "model", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def environment(chat_model: Path, tmp_path: Path) -> dict[str, str]:
    """Environment variables for the cluster and the example, with data from the examples' own program."""
    program = [sys.executable, str(EXAMPLES / "data.py"), "--out", str(tmp_path / "data"), "--rows", "16"]
    subprocess.run(program, check=True, timeout=120)
    data = tmp_path / "data" / "openrlhf" / "train.jsonl"
    paths = {"MODEL": str(chat_model), "DATA": str(data), "OUT": str(tmp_path / "out")}
    # Newer Ray asks for a token where this user has one; the test's clusters have a token of their own.
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return {**os.environ, **ENVIRONMENT, "PATH": SEARCH_PATH, **TINY, **paths, **token}


@contextmanager
def started_cluster(environment: dict[str, str], *options: str) -> Iterator[tuple[int, int]]:
    """A Ray cluster of one node that says it has 8 GPUs: its port and that of its dashboard; gone at the end."""
    prepare_extensions()
    folder = tempfile.mkdtemp(prefix="klp")  # Ray's sockets need a short path
    port, dashboard = free_port(), free_port()
    head = f"ray start --head --port={port} --temp-dir={folder} --num-cpus=16 --num-gpus=8 --disable-usage-stats"
    head += f" --object-store-memory=200000000 --ray-client-server-port={free_port()} --dashboard-port={dashboard}"
    # The session's leader stays: it is found by its number when all of its processes are to end.
    script = f"{head} {' '.join(options)} >&2 && echo ready && cat"
    leader = subprocess.Popen(
        ["bash", "-c", script], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert leader.stdout.readline().strip() == b"ready"
        yield port, dashboard
    finally:
        end_session(leader.pid)
        leader.wait()
        leader.stdin.close()
        leader.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)


def execute(script: str, folder: Path, environment: dict[str, str]) -> str:
    """Run a script of the examples for this host until its end."""
    path = f"openrlhf/{script}"
    return examples.execute(path, FOR_THE_CPU, folder, environment, seconds=900, end_session=end_session)


def assert_trained(output: str, folder: Path) -> None:
    """The worker gave its receipt, steps ran under the regulariser, and the model was saved."""
    assert set(re.findall(RECEIPT, output)) == {("0", "1")}, output[-8000:]
    found = re.findall(r"Global step \d+: (\{.*?\})", output)
    steps = [ast.literal_eval(re.sub(r"\b(nan|-?inf)\b", "None", line)) for line in found]
    assert len(steps) >= 2
    assert all(step["kl/active"] == 1 and step["kl/beta"] == 0.001 for step in steps)
    assert (folder / "out" / "model" / "config.json").exists()


def test_one_node(environment, tmp_path):
    # OpenRLHF starts Ray by itself; here it is told of a cluster, because it would ask this machine for its GPUs.
    with started_cluster(environment, "--include-dashboard=false") as (port, _):
        output = execute("one_node.sh", tmp_path, environment | {"RAY_ADDRESS": f"127.0.0.1:{port}"})
    assert_trained(output, tmp_path)


def test_ray_job(environment, tmp_path):
    ports = "--dashboard-agent-listen-port=0", "--dashboard-agent-grpc-port=0"
    with started_cluster(environment, *ports) as (_, dashboard):
        job = {"ADDRESS": f"http://127.0.0.1:{dashboard}", "NODES": "1"}
        output = execute("ray_job.sh", tmp_path, environment | job)
    assert_trained(output, tmp_path)
    assert "Job 'raysubmit_" in output
