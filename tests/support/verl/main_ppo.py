"""Runs of veRL's real programs in a process of their own, on this machine's CPU."""

import json
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

from tests.support.verl.ray_support import ENVIRONMENT, SINCE_0_9

SETTINGS = {
    "algorithm.adv_estimator": "grpo",
    "data.train_batch_size": 4,
    "data.val_batch_size": 4,
    "data.max_prompt_length": 32,
    "data.max_response_length": 8,
    "data.dataloader_num_workers": 0,
    "data.filter_overlong_prompts": False,
    "actor_rollout_ref.model.use_remove_padding": False,
    "actor_rollout_ref.model.enable_gradient_checkpointing": False,
    "+actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
    "actor_rollout_ref.actor.strategy": "fsdp2",
    "actor_rollout_ref.actor.ppo_mini_batch_size": 4,
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 4,
    "actor_rollout_ref.actor.use_torch_compile": False,
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile": False,
    "actor_rollout_ref.actor.fsdp_config.model_dtype": "fp32",
    "+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype": "fp32",
    "actor_rollout_ref.actor.optim.lr": 1e-3,
    "actor_rollout_ref.ref.strategy": "fsdp2",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": 4,
    "actor_rollout_ref.ref.use_torch_compile": False,
    "actor_rollout_ref.ref.fsdp_config.model_dtype": "fp32",
    "+actor_rollout_ref.ref.fsdp_config.mixed_precision.param_dtype": "fp32",
    "actor_rollout_ref.rollout.name": "transformers_cpu",
    "actor_rollout_ref.rollout.n": 2,
    "actor_rollout_ref.rollout.calculate_log_probs": True,
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
    "actor_rollout_ref.rollout.agent.num_workers": 1,
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 4,
    "reward.custom_reward_function.name": "compute_score",
    "reward.num_workers": 1,
    "trainer.device": "cpu",
    "trainer.nnodes": 1,
    "trainer.logger": '["console","file"]',
    "trainer.val_before_train": False,
    "trainer.test_freq": -1,
    "trainer.save_freq": -1,
    "trainer.total_training_steps": 2,
    "trainer.resume_mode": "disable",
    # Each of the default's eight storage processes takes seconds to import veRL.
    "++transfer_queue.backend.SimpleStorage.num_data_storage_units": 1 if SINCE_0_9 else None,
    "ray_kwargs.ray_init.num_cpus": 16,
    "+ray_kwargs.ray_init.include_dashboard": False,
    "+ray_kwargs.ray_init.object_store_memory": 200_000_000,
}

CRITIC = {
    "critic.enable": True,
    "critic.strategy": "fsdp2",
    "critic.ppo_mini_batch_size": 4,
    "critic.ppo_micro_batch_size_per_gpu": 8,
    "critic.model.use_remove_padding": False,
    "+critic.model.override_config.attn_implementation": "sdpa",
    "critic.fsdp.model_dtype": "fp32",
}
LOSS = {"actor_rollout_ref.actor.use_kl_loss": True, "actor_rollout_ref.actor.kl_loss_coef": 0.1}
KL_TYPE = "actor_rollout_ref.actor.kl_loss_type"
OF_TRAINER = {"v0": {"trainer.use_v1": False} if SINCE_0_9 else {}, "v1": {}}
"""Settings that choose a trainer, by its name in :data:`ray_support.TRAINERS`."""


@dataclass(frozen=True)
class Running:
    """The launching process, what is printed so far, and veRL's own metrics so far."""

    process: subprocess.Popen[bytes]
    output: Path
    log: Path

    def await_step(self, step: int, seconds: float = 420) -> str:
        """Everything printed once the metrics of a step are there."""
        deadline = time.monotonic() + seconds
        while len(_steps(self.log)) < step:
            assert self.process.poll() is None, self.output.read_text(errors="replace")[-6000:]
            assert time.monotonic() < deadline, f"step {step} did not come"
            time.sleep(0.5)
        return _plain(self.output.read_text(errors="replace"))


@dataclass(frozen=True)
class Finished:
    """Exit status, everything printed, and veRL's own metrics by step."""

    status: int
    output: str
    steps: list[dict[str, float]]

    def error(self) -> str:
        """What a user sees of a failure."""
        return self.output[-6000:]


def run(
    assets: Path,
    work: Path,
    settings: dict[str, object],
    *,
    ranks: int = 1,
    environment: dict[str, str] | None = None,
    folders: Sequence[Path] = (),
    meanwhile: Callable[[Running], None] = lambda running: None,
    seconds: float = 600,  # six times what a run takes on two free cores
    program: str = "verl.trainer.main_ppo",
) -> Finished:
    """Run a program of veRL with `settings` over the defaults above; what it starts ends with it.

    Settings of None are left out. `folders` come first on the import path. `meanwhile` is called while it runs.
    """
    work.mkdir(parents=True, exist_ok=True)
    log = work / "metrics.jsonl"
    log.unlink(missing_ok=True)
    # Ray's sockets need a short path.
    ray_folder = tempfile.mkdtemp(prefix="klp")
    merged = {
        **SETTINGS,
        "data.train_files": assets / "train.parquet",
        "data.val_files": assets / "val.parquet",
        "actor_rollout_ref.model.path": assets / "model",
        "critic.model.path": assets / "model",
        "reward.custom_reward_function.path": assets / "reward.py",
        "trainer.n_gpus_per_node": ranks,
        "actor_rollout_ref.rollout.n_gpus_per_node": ranks,
        "trainer.default_local_dir": work / "checkpoints",
        "+ray_kwargs.ray_init.num_gpus": ranks,
        "+ray_kwargs.ray_init._temp_dir": ray_folder,
        # Older veRL asks Ray for a resource called after the device.
        "+ray_kwargs.ray_init.resources.cpu": None if SINCE_0_9 else ranks,
        **settings,
    }
    overrides = [f"{key}={value}" for key, value in merged.items() if value is not None]
    variables = {**os.environ, **ENVIRONMENT, "VERL_FILE_LOGGER_PATH": str(log), **(environment or {})}
    variables["PYTHONPATH"] = os.pathsep.join([*map(str, folders), variables["PYTHONPATH"]])
    output = work / "output.txt"
    with output.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", program, *overrides],
            cwd=work,
            env=variables,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            meanwhile(Running(process, output, log))
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = -signal.SIGKILL
        finally:
            end_session(process.pid)
            process.wait()
            shutil.rmtree(ray_folder, ignore_errors=True)
    return Finished(status, _plain(output.read_text(errors="replace")), _steps(log))


def _steps(log: Path) -> list[dict[str, float]]:
    # A line without its end is still being written.
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [json.loads(line)["data"] for line in lines if line.endswith("\n")]


def end_session(leader: int) -> None:
    """Kill all processes of a session: Ray's own are in that of the process that started them."""
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and os.getsid(int(folder.name)) == leader:
                os.kill(int(folder.name), signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def finished(result: Finished, steps: int = 2) -> list[dict[str, float]]:
    """Check that a run under a spec made its steps and that the spec was active in each; the metrics by step."""
    assert result.status == 0, result.error()
    assert len(result.steps) == steps
    assert all(step["kl/active"] == 1 for step in result.steps)
    return result.steps
