"""Receipts of real workers, on one node and on two; controllers in their checkpoints; faults."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kl_plugins.adapters.verl import require_receipts
from kl_plugins.receipts import MissingReceiptError
from tests.support.verl import remote
from tests.support.verl.ray_support import ENVIRONMENT, SINCE_0_9, hide_package
from tests.support.verl.workers import Group, make_batch

ROOT = Path(__file__).resolve().parents[2]
SPEC = "k2@loss/is:token"


@pytest.fixture(scope="module")
def batch(model):
    return make_batch(model)


def test_every_worker_gives_a_receipt(pair):
    pair.use(SPEC, receipts=False)
    receipts = require_receipts(pair.workers, SPEC)
    assert [receipt.rank for receipt in receipts] == [0, 1]
    assert len({receipt.pid for receipt in receipts} | {os.getpid()}) == 3
    assert {receipt.spec for receipt in receipts} == {SPEC}
    assert {receipt.target for receipt in receipts} == {"reverse_kl_token_behaviour"}
    assert "TrainingWorker.train_batch" in receipts[0].patches


def test_a_worker_that_nobody_asked_does_not_train(pair, batch):
    pair.use(SPEC, receipts=False)
    with pytest.raises(RuntimeError, match="its trainer never asked for receipts"):
        pair.step(batch)


def test_a_worker_with_another_spec_is_named(pair):
    pair.use("k3@loss", receipts=False)
    with pytest.raises(MissingReceiptError, match=r"rank 1 \(pid \d+ on .*holds k3@loss, not k2@loss/is:token"):
        require_receipts(pair.workers, SPEC)


def test_controllers_are_saved_with_verls_checkpoints(pair, batch, tmp_path):
    text = "k2@loss/beta:dual-0.001-1"
    pair.use(text)
    seen = [pair.step(batch).metrics["kl_coef"] for _ in range(2)]
    pair.workers.save_checkpoint(str(tmp_path / "actor"), global_step=2)
    states = [json.loads(path.read_text()) for path in sorted((tmp_path / "actor").glob("kl_plugins_rank_*.json"))]
    assert len(states) == 2
    assert states[0] == states[1], "every rank holds the same beta"
    third = pair.step(batch).metrics["kl_coef"]
    assert len({*seen, third}) == 3
    pair.use(text)  # starts again
    assert pair.step(batch).metrics["kl_coef"] == seen[0]
    pair.workers.load_checkpoint(str(tmp_path / "actor"))
    assert pair.step(batch).metrics["kl_coef"] == third


def test_a_dead_worker_is_named(assets, cluster):
    import ray

    group = Group(str(assets / "model"), 1, packed=True)
    group.use(SPEC, receipts=False)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(group.workers.workers[0].__ray_call__.remote(remote.end))
    with pytest.raises(MissingReceiptError, match=r"no receipt from 1 of 1 workers:\s+rank 0: Actor\w*Error"):
        require_receipts(group.workers, SPEC)
    group.end()


def two_nodes(assets, *second):
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.support.verl.two_nodes",
        "train",
        str(assets / "model"),
        *map(str, second),
    ]
    variables = {**os.environ, **ENVIRONMENT}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, cwd=ROOT)


def test_workers_on_two_nodes_give_receipts_and_train(assets):
    result = two_nodes(assets)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "nodes 2" in result.stdout
    assert re.findall(r"active in veRL \S+, rank (\d) of 2", result.stderr) == ["0", "1"]
    assert "trained 1.0" in result.stdout


def test_a_node_without_the_package_stops_the_run_and_is_named(assets, tmp_path):
    result = two_nodes(assets, hide_package(tmp_path))
    assert result.returncode != 0
    assert "trained" not in result.stdout
    # Older veRL does not start on a node where what VERL_USE_EXTERNAL_MODULES names is missing.
    message = (
        r"no receipt from 1 of 2 workers:\s+rank \d \(pid \d+ on \S+\): kl-plugins is not installed there"
        if SINCE_0_9
        else "No module named 'kl_plugins"
    )
    assert re.search(message, result.stderr), result.stderr[-3000:]
