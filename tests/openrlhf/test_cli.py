"""OpenRLHF's real program, from the command line to the saved model: launcher, Ray, vLLM, DeepSpeed, weight sync."""

import json
import re

import pytest

from kl_plugins.spec.observation import Observation
from tests.support.openrlhf.cli import COLOCATED, run

KL = "--algo.kl.estimator"
LOSS = ("--algo.kl.use_loss", KL)
TWO_EPOCHS = ("--train.max_epochs", 2)

pytestmark = pytest.mark.timeout(2400)


def finished(result, least=2):
    assert result.status == 0, result.error()
    assert len(result.steps) >= least, result.error()
    assert all(step["kl/active"] == 1 for step in result.steps)
    return result.steps


def receipts(result):
    """Lines of the receipts; a line that Ray repeats counts once."""
    return sorted(set(re.findall(r"kl-plugins: \S+ active in OpenRLHF \S+, rank \d+ of \d+ .*", result.output)))


def test_a_prefix_weighted_loss_over_two_epochs(assets, tmp_path):
    result = run(assets, tmp_path, [*COLOCATED, *LOSS, "k2@loss/is:prefix/cap:5/behaviour:sampler", *TWO_EPOCHS])
    steps = finished(result)
    assert len(receipts(result)) == 1
    assert "behaviour sampler" in receipts(result)[0]
    # The learner recomputes what vLLM sampled with other kernels, and the second epoch is off-policy.
    assert all(1 < step["kl/weight/max"] <= 5 and 0 < step["kl/ess"] < 1 for step in steps)
    assert steps[-1]["kl/value"] > 0 < steps[-1]["kl"]
    assert "vllm_kl" not in steps[0], "the policy loss is to stay uncorrected"
    assert (tmp_path / "saved" / "config.json").exists()


@pytest.mark.full
def test_stock_runs_without_the_plugin(assets, tmp_path):
    result = run(assets, tmp_path, [*COLOCATED, *LOSS, "k2"], plugin=False)
    assert result.status == 0, result.error()
    assert len(result.steps) == 2
    assert not [key for key in result.steps[-1] if key.startswith("kl/")]


@pytest.mark.full
def test_kl_in_reward(assets, tmp_path):
    result = run(assets, tmp_path, [*COLOCATED, KL, "k1@reward", *TWO_EPOCHS])
    steps = finished(result)
    # From the second step on the policy has left the reference.
    assert all(step["kl"] == pytest.approx(step["kl/reverse_k1"], rel=0.3, abs=0.02) for step in steps)
    assert any(abs(step["kl/reverse_k1"]) > 0 for step in steps[1:])


@pytest.mark.full
def test_advantage_under_group_norm(assets, tmp_path):
    flags = [*COLOCATED, KL, "k1@advantage", "--algo.advantage.estimator", "group_norm", *TWO_EPOCHS]
    steps = finished(run(assets, tmp_path, flags))
    assert any(abs(step["kl/reverse_k1"]) > 0 for step in steps[1:])


@pytest.mark.full
def test_exact_loss(assets, tmp_path):
    steps = finished(run(assets, tmp_path, [*COLOCATED, *LOSS, "exact@loss/is:prefix/cap:5", *TWO_EPOCHS]))
    assert all(step["kl"] >= 0 for step in steps), "an exact KL is never negative"
    assert steps[-1]["kl/value"] > 0


@pytest.mark.full
def test_top_k_of_the_reference_actor_in_the_async_program(assets, tmp_path):
    flags = [
        "--train.async_enable",
        "--train.batch_size",
        8,
        "--data.max_samples",
        16,
        *LOSS,
        "exact@loss/top/is:token",
    ]
    result = run(assets, tmp_path, [*flags, *TWO_EPOCHS])
    steps = finished(result)
    assert all(step["kl/value"] == step["kl/exact"] for step in steps)
    assert steps[-1]["kl/exact"] != 0
    assert "58 numbers per response token" in receipts(result)[0]


@pytest.mark.full
@pytest.mark.parametrize(
    ("flags", "text"),
    [(LOSS, "k3/observe:exact@loss/top/is:token/probe:2"), ((KL,), "k1/observe:k2@loss/probe:1")],
    ids=["loss", "reward"],
)
def test_a_whole_run_is_observed(flags, text, assets, tmp_path):
    result = run(assets, tmp_path, [*COLOCATED, *flags, text, *TWO_EPOCHS])
    steps = finished(result)
    assert f"{Observation.parse(text)} observes, changes nothing, in OpenRLHF" in result.output
    assert all(step["kl/observed"] == 1 for step in steps)
    assert steps[-1]["kl/value"] > 0
    probes = [key for step in steps for key in step if key.startswith("kl/probe/")]
    assert {"kl/probe/host/dead_frac", "kl/probe/k2/norm_ratio"} <= set(probes)
    assert ("kl/exact" in steps[-1]) is ("top" in text)
    assert ("58 numbers per response token" in result.output) is ("top" in text)


@pytest.mark.full
def test_two_ranks(assets, tmp_path):
    ranks = ["--actor.num_gpus_per_node", 2, "--ref.num_gpus_per_node", 2, "--train.micro_batch_size", 2]
    sizes = ["--rollout.micro_batch_size", 2, "--train.batch_size", 8]
    result = run(assets, tmp_path, [*ranks, *sizes, *LOSS, "k2@loss/is:prefix/cap:5", *TWO_EPOCHS])
    finished(result)
    assert [re.search(r"rank (\d) of 2", line)[1] for line in receipts(result)] == ["0", "1"]


@pytest.mark.full
def test_partial_rollouts_are_weighted_by_what_the_sampler_was(assets, tmp_path):
    # One update per rollout batch: the old policy is then the policy itself, however stale the sampler was.
    flags = ["--train.async_enable", "--train.partial_rollout_enable", "--train.batch_size", 8]
    flags += ["--data.max_samples", 16, "--actor.adam.lr", 1e-3, *LOSS]
    sampler, old = (
        finished(run(assets, tmp_path / source, [*flags, f"k2@loss/is:token/behaviour:{source}"]))
        for source in ("sampler", "old")
    )
    assert all(step["kl/weight/max"] == pytest.approx(1, abs=0.02) for step in old)
    assert all(step["kl/ess"] == pytest.approx(1, abs=1e-3) for step in old)
    assert max(step["kl/weight/max"] for step in sampler) > 1.1
    assert min(step["kl/ess"] for step in sampler) < 0.99


@pytest.mark.full
@pytest.mark.parametrize(
    ("placement", "controller"),
    [("@loss", "linear-0.1-0.5-8"), ("@advantage", "dual-0.001-0.1")],
)
def test_resume_goes_on_with_the_controller(placement, controller, assets, tmp_path):
    place = [*LOSS, f"k2@loss/beta:{controller}"] if placement == "@loss" else [KL, f"k1@advantage/beta:{controller}"]
    flags = [*COLOCATED, *place, "--algo.advantage.estimator", "group_norm", "--ckpt.save_steps", 2]
    first = finished(run(assets, tmp_path, [*flags, "--data.max_samples", 8]))
    again = finished(run(assets, tmp_path, [*flags, "--data.max_samples", 16, "--ckpt.load_enable"]), least=1)
    betas = [step["kl/beta"] for step in first]
    assert len(set(betas)) == len(betas), json.dumps(betas)
    assert again[0]["kl/beta"] not in betas, "the controller started again"
    if placement == "@loss":
        assert again[0]["kl/beta"] == pytest.approx(betas[-1] + (betas[-1] - betas[-2]))
