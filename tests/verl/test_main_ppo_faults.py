"""veRL's real program when something dies, and on two nodes."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.verl.main_ppo import end_session, run
from tests.support.verl.ray_support import ENVIRONMENT, SINCE_0_9, WITHOUT_PLUGIN, hide_package

ROOT = Path(__file__).resolve().parents[2]
SPEC = "k2@loss/is:token"
LOSS = {
    "actor_rollout_ref.actor.use_kl_loss": True,
    "actor_rollout_ref.actor.kl_loss_coef": 0.1,
    "actor_rollout_ref.actor.kl_loss_type": SPEC,
}

pytestmark = [pytest.mark.full, pytest.mark.timeout(1200)]


def test_a_killed_worker_ends_the_run_and_the_last_checkpoint_resumes(assets, tmp_path):
    def kill_rank_1(running):
        printed = running.await_step(2)
        os.kill(int(re.search(r"rank 1 of 2 \(pid (\d+)", printed).group(1)), signal.SIGKILL)

    settings = {
        **LOSS,
        "actor_rollout_ref.actor.kl_loss_type": f"{SPEC}/beta:linear-0.1-0.9-8",
        "trainer.save_freq": 1,
        "trainer.total_training_steps": 40,
    }
    broken = run(assets, tmp_path, settings, ranks=2, meanwhile=kill_rank_1)
    assert broken.status == 1, broken.error()  # by itself: the time limit would have been a signal
    assert re.search(r"Actor(Died|Unavailable)Error", broken.output), broken.error()
    last = int((tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert last >= 2
    settings |= {"trainer.resume_mode": "auto", "trainer.total_training_steps": last + 2}
    resumed = run(assets, tmp_path, settings, ranks=2)
    assert resumed.status == 0, resumed.error()
    assert [step["training/global_step"] for step in resumed.steps] == [last + 1, last + 2]
    assert [step["kl/beta"] for step in resumed.steps] == pytest.approx([0.1 * (last + 1), 0.1 * (last + 2)])


def test_without_the_package_a_spec_is_verls_unknown_estimator(assets, tmp_path):
    (tmp_path / "hidden").mkdir()
    # Older veRL imports what a variable names, and ends where that is missing.
    environment = {} if SINCE_0_9 else WITHOUT_PLUGIN
    result = run(assets, tmp_path, LOSS, folders=[hide_package(tmp_path / "hidden")], environment=environment)
    assert result.status == 1, result.error()
    assert re.search(r"kl_penalty_forward[\s\S]*NotImplementedError", result.output), result.error()
    assert "kl-plugins" not in result.output.replace(str(tmp_path), "")
    assert not result.steps


@pytest.fixture
def two_nodes():
    """Starts a cluster of two nodes and gives its address; folders come first on the second node's import path."""
    started = []

    def start(*second):
        command = [sys.executable, "-W", "ignore", "-m", "tests.support.verl.two_nodes", "serve", *map(str, second)]
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process.stdout.readline().strip()

    yield start
    for process in started:
        process.stdin.close()
        try:
            process.wait(60)
        finally:
            end_session(process.pid)
            process.stdout.close()


def on_two_nodes(assets, work, address):
    settings = {
        **LOSS,
        "trainer.nnodes": 2,
        # The cluster is there already.
        "ray_kwargs.ray_init.num_cpus": None,
        "+ray_kwargs.ray_init.num_gpus": None,
        "+ray_kwargs.ray_init.resources.cpu": None,
        "+ray_kwargs.ray_init.include_dashboard": None,
        "+ray_kwargs.ray_init.object_store_memory": None,
        "+ray_kwargs.ray_init._temp_dir": None,
        # Its processes have the environment of the nodes.
        "+ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH": work / "metrics.jsonl",
    }
    return run(assets, work, settings, environment={"RAY_ADDRESS": address})


def test_a_rank_on_each_of_two_nodes_gives_a_receipt(assets, tmp_path, two_nodes):
    result = on_two_nodes(assets, tmp_path, two_nodes())
    assert result.status == 0, result.error()
    assert sorted(re.findall(rf"{SPEC} active in veRL \S+, rank (\d) of 2", result.output)) == ["0", "1"]
    assert [step["kl/active"] for step in result.steps] == [1, 1]
    assert result.steps[1]["kl/value"] > 0


def test_a_node_without_the_package_stops_the_run_before_the_first_rollout(assets, tmp_path, two_nodes):
    (tmp_path / "hidden").mkdir()
    result = on_two_nodes(assets, tmp_path, two_nodes(hide_package(tmp_path / "hidden")))
    assert result.status == 1, result.error()
    # Ray may put a prefix before every line.
    missing = r"no receipt from 1 of 2 workers:\s+(\(.*\)\s+)?rank \d \(pid \d+ on \S+\): kl-plugins is not installed"
    # Where Ray puts the trainer itself onto that node, it is the other node's worker that refuses to train.
    alone = r"its trainer never asked for receipts.*missing where the trainer runs \(install it on every node\)"
    # Older veRL does not start on a node where what VERL_USE_EXTERNAL_MODULES names is missing.
    older = "No module named 'kl_plugins"
    assert re.search(f"{missing}|{alone}" if SINCE_0_9 else older, result.output), result.error()
    assert not result.steps
