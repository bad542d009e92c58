"""``python -m benchmarks.demo``: a real run of a few steps, and what it leaves behind."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.demo import evaluate, model, task
from benchmarks.demo.arms import ARMS, K1_ADVANTAGE, K1_LOSS, K2_LOSS, NATIVE_K3, NONE
from benchmarks.demo.report import checks, sentence
from tests.support.trl.launch import ROOT

LIMIT = 280


def demo(*arguments):
    return [sys.executable, "-m", "benchmarks.demo", *map(str, arguments)]


@pytest.mark.timeout(2 * LIMIT)
def test_smoke_run_leaves_its_files_and_is_resumed(tmp_path):
    made = subprocess.run(demo("--smoke", "--out", tmp_path), cwd=ROOT, text=True, capture_output=True, timeout=LIMIT)
    assert made.returncode == 0, made.stdout + made.stderr
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["arms"].keys() == {arm.name for arm in ARMS}
    assert summary["sentence"].split()[-1] in made.stdout
    assert 0.0 < summary["coverage_min"] <= 1.0 + 1e-9
    for name, log in summary["plugin_log"].items():
        spec_arm = name not in ("none", "native-k3")
        assert spec_arm == any("active in TRL" in line for line in log), (name, log)
    for arm in ARMS:
        curve = json.loads((tmp_path / "runs" / f"{arm.slug}-seed1.json").read_text())["curve"]
        assert [point["step"] for point in curve] == [0, 4]
        assert curve[0]["kl"] == pytest.approx(0.0, abs=1e-9)
        assert curve[-1]["kl"] > 1e-6  # it was trained
    # A run that is taken away is made again, the others are not.
    kept = tmp_path / "runs" / f"{NONE.slug}-seed1.json"
    before = kept.stat().st_mtime_ns
    (tmp_path / "runs" / f"{NATIVE_K3.slug}-seed1.json").unlink()
    again = subprocess.run(demo("--smoke", "--out", tmp_path), cwd=ROOT, text=True, capture_output=True, timeout=LIMIT)
    assert again.returncode == 0, again.stdout + again.stderr
    assert kept.stat().st_mtime_ns == before
    assert json.loads((tmp_path / "summary.json").read_text())["runs_reused"] == len(ARMS) - 1


def test_a_dying_worker_is_an_error(tmp_path):
    process = subprocess.Popen(
        demo("--smoke", "--arms", "none", "--workers", 1, "--out", tmp_path),
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    until = time.monotonic() + LIMIT
    while not list((tmp_path / "logs").glob("worker-*.log")) and time.monotonic() < until:
        time.sleep(0.2)
    (log,) = (tmp_path / "logs").glob("worker-*.log")
    os.kill(int(log.stem.split("-")[1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 1, output
    assert "a worker died" in output


def test_an_unknown_arm_is_refused():
    refused = subprocess.run(demo("--arms", "k2@los"), cwd=ROOT, text=True, capture_output=True, timeout=LIMIT)
    assert refused.returncode == 2
    assert "loss" in refused.stderr


def test_the_verifier():
    assert task.value("2 * 5 + 2") == 12
    assert task.value("9 - 2 * 3") == 3
    assert task.value("9 -") is None
    assert task.value("") is None
    assert task.value("12 + 1") is None
    assert task.verify("1 2 =", "2 * 5 + 2") == 1.0
    assert task.verify("1 2 =", "5 + 5 + 2") == 0.0  # right, but no product
    assert task.verify("1 1 =", "2 * 5 + 2") == 0.0


def test_enumeration_agrees_with_samples():
    policy, reference = model.blank_model(1).eval(), model.blank_model(2).eval()
    with torch.no_grad():  # sharp enough for the tree to be visited almost whole
        policy.lm_head.weight *= 40
        reference.lm_head.weight *= 20
    exact = evaluate.evaluate(policy, reference, lambda u: u, True)
    assert exact["coverage"] > 0.95
    torch.manual_seed(0)
    asked = torch.tensor([task.ids(task.prompt(n)) for n in task.NUMBERS]).repeat_interleave(500, 0)
    text = policy.generate(asked, do_sample=True, max_new_tokens=task.COMPLETION_TOKENS, top_k=0)
    start = asked.shape[1]
    with torch.no_grad():
        lp, rp = (torch.log_softmax(m(input_ids=text).logits[:, start - 1 : -1], -1) for m in (policy, reference))
    written = text[:, start:, None]
    mask = (text[:, start:] == 1).cumsum(1) - (text[:, start:] == 1).long() == 0
    logp, u = lp.gather(-1, written)[..., 0] * mask, (lp - rp).gather(-1, written)[..., 0] * mask
    later = u.flip(1).cumsum(1).flip(1)[mask]
    error = 4 / math.sqrt(len(text))  # four standard errors of the mean
    assert exact["kl"] == pytest.approx(u.sum(1).mean().item(), abs=error * u.sum(1).std().item() + 0.05 * exact["kl"])
    assert exact["entropy"] == pytest.approx(-logp.sum(1).mean().item(), rel=0.1)
    assert exact["coef_mean"] == pytest.approx(later.mean().item(), rel=0.1)
    assert exact["coef_std"] == pytest.approx(later.std().item(), rel=0.1)


def ends(**changed):
    made = {
        NONE.name: {"reward": [0.99, 0.98], "kl": [8.0, 9.0], "entropy": [0.1, 0.2], "objective": [-0.6, -0.8]},
        K1_LOSS.name: {"reward": [0.99, 0.98], "kl": [8.5, 8.0], "entropy": [0.1, 0.2], "objective": [-0.7, -0.6]},
        NATIVE_K3.name: {"reward": [0.7, 0.7], "kl": [3.0, 3.1], "entropy": [5.0, 5.0], "objective": [0.1, 0.1]},
        K2_LOSS.name: {"reward": [0.5, 0.5], "kl": [2.0, 2.1], "entropy": [5.0, 5.0], "objective": [0.1, 0.1]},
        K1_ADVANTAGE.name: {"reward": [0.4, 0.4], "kl": [1.0, 1.1], "entropy": [5.0, 5.0], "objective": [0.2, 0.2]},
    }
    for arm, std in ((NATIVE_K3, [9.0, 30.0]), (K2_LOSS, [1.0, 1.1]), (K1_ADVANTAGE, [1.5, 1.5])):
        made[arm.name]["coef_std"] = std
    for name, measures in changed.items():
        made[{"k1": K1_LOSS, "k2": K2_LOSS, "k3": NATIVE_K3, "advantage": K1_ADVANTAGE}[name].name].update(measures)
    return made


def test_the_sentence_claims_what_the_numbers_show():
    found = checks(ends(), reference_entropy=5.4)
    assert len(found) == 5
    assert all(check.holds for check in found)
    assert "but" not in sentence(found, 300)


@pytest.mark.parametrize(
    ("changed", "failing"),
    [
        ({"k1": {"kl": [2.0, 2.0]}}, 0),
        ({"k1": {"entropy": [5.0, 5.0]}}, 0),
        ({"k2": {"kl": [2.0, 4.5]}}, 1),
        ({"advantage": {"entropy": [5.0, 2.0]}}, 1),
        ({"k3": {"kl": [3.0, 2.05]}}, 2),
        ({"k3": {"coef_std": [9.0, 2.0]}}, 3),
        ({"advantage": {"objective": [0.2, 0.05]}}, 4),
    ],
)
def test_the_sentence_denies_what_they_do_not_show(changed, failing):
    found = checks(ends(**changed), reference_entropy=5.4)
    assert not found[failing].holds
    assert found[failing].denial in sentence(found, 300)
    assert found[failing].claim not in sentence(found, 300)
