"""Runs of OpenRLHF's real program, from the command line to the saved model, with vLLM on this machine's CPU."""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.openrlhf.command_line import MODULE
from tests.support.openrlhf.ray_support import ENVIRONMENT, end_session, free_port, prepare_extensions

DEFAULTS = {
    "--data.input_key": "input",
    "--data.label_key": "label",
    "--data.max_len": 48,
    "--data.max_samples": 8,
    "--ref.num_gpus_per_node": 1,
    "--actor.num_gpus_per_node": 1,
    "--vllm.num_engines": 1,
    "--vllm.gpu_memory_utilization": 0.3,
    "--vllm.sync_backend": "gloo",
    "--ds.attn_implementation": "eager",
    "--ds.zero_stage": 2,
    "--rollout.batch_size": 4,
    "--rollout.n_samples_per_prompt": 2,
    "--rollout.micro_batch_size": 4,
    "--rollout.max_new_tokens": 8,
    "--train.batch_size": 4,
    "--train.micro_batch_size": 4,
    "--algo.advantage.estimator": "reinforce_baseline",
    "--algo.kl.init_coef": 0.1,
    "--actor.adam.lr": 1e-4,
    "--actor.lr_warmup_ratio": 0,
}
SWITCHES = ("--vllm.enforce_eager",)
COLOCATED = ("--train.colocate_all",)
GPUS = 8
"""Ray is told of as many, and nothing uses them: OpenRLHF asks for placement groups of them."""


@dataclass(frozen=True)
class Finished:
    """Exit status, everything printed, and the metrics that OpenRLHF logged, by step."""

    status: int
    output: str
    steps: list[dict[str, float]]

    def error(self) -> str:
        """What a user sees of a failure."""
        return self.output[-8000:]


def run(
    assets: Path,
    work: Path,
    flags: Sequence[object],
    *,
    plugin: bool = True,
    environment: dict[str, str] | None = None,
    seconds: float = 900,
    watch: Callable[[str], None] | None = None,
) -> Finished:
    """Run the program with `flags` over the defaults above, on a Ray cluster that starts and ends with it.

    Args:
        assets: what :func:`tests.support.openrlhf.assets.build` wrote.
        work: folder of the run: output, checkpoints, saved model.
        flags: of the program; two steps of 8 sequences without them.
        plugin: start it by ``kl-plugins run``, else by ``python -m``.
        environment: more variables, for every process.
        seconds: bound of the whole.
        watch: called now and then with the output so far.
    """
    prepare_extensions()
    work.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="klp")  # Ray's sockets need a short path
    paths = {
        "--actor.model_name_or_path": assets / "model",
        "--reward.remote_url": assets / "reward.py",
        "--data.prompt_dataset": assets / "prompts.jsonl",
        "--ckpt.path": work / "checkpoints",
        "--ckpt.output_dir": work / "saved",
    }
    words = [word for pair in {**DEFAULTS, **paths}.items() for word in pair]
    start = ["-m", "kl_plugins", "run"] if plugin else ["-m"]
    program = [sys.executable, "-W", "ignore", *start, MODULE, *map(str, words), *SWITCHES, *map(str, flags)]
    # The cluster belongs to the program's session, so that nothing of it survives.
    port, client_port = free_port(), free_port()
    head = f"ray start --head --port={port} --temp-dir={folder} --num-cpus=16 --num-gpus={GPUS}"
    head += " --include-dashboard=false --object-store-memory=200000000 --disable-usage-stats"
    head += f" --ray-client-server-port={client_port}"
    script = f'{head} >&2 || exit 99\nexec "$@"'
    variables = {**os.environ, **ENVIRONMENT, **(environment or {}), "RAY_ADDRESS": f"127.0.0.1:{port}"}
    output = work / "output.txt"
    with output.open("w") as stream:
        process = subprocess.Popen(
            ["bash", "-c", script, "bash", *program],
            cwd=work,
            env=variables,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = _wait(process, output, seconds, watch)
        finally:
            end_session(process.pid)
            process.wait()
            shutil.rmtree(folder, ignore_errors=True)
    text = re.sub(r"\x1b\[[0-9;]*m", "", output.read_text(errors="replace"))
    return Finished(status, text, _steps(text))


def _wait(process: subprocess.Popen, output: Path, seconds: float, watch: Callable[[str], None] | None) -> int:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            return process.wait(1 if watch else max(end - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            if watch:
                watch(output.read_text(errors="replace"))
    return -signal.SIGKILL


def _steps(text: str) -> list[dict[str, float]]:
    lines = re.findall(r"Global step \d+: (\{.*?\})", text)
    return [ast.literal_eval(re.sub(r"\b(nan|-?inf)\b", "None", line)) for line in lines]
