"""``python -m benchmarks.study --host verl``: real updates of a worker under each placement, and what is refused."""

import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from benchmarks.study import comparison, models, plan, verl_host
from benchmarks.study.settings import Cell, Settings

QUICK = Settings(steps=4, evaluate_every=2, pretrain_steps=30, prompts=4, generations=4, learning_rate=2e-2)


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Folders of briefly trained references of two families, of the task with the fewest completions."""
    folder = tmp_path_factory.mktemp("references")
    for family in ("llama", "qwen2"):
        models.make_reference(folder / family, "sums", family, QUICK, lambda steps: None)
    return folder


@pytest.fixture(scope="module")
def train(references, cluster):
    """Trains a cell; gives its result, and what each update got and said."""

    def run(arm, delay=0, precision="fp32", family="llama", settings=QUICK):
        updates, ticks = [], []
        cell = Cell("sums", family, arm, delay, precision, "verl")
        result = verl_host.run(
            cell, 1, settings, references / family, ticks.append, lambda *update: updates.append(update)
        )
        assert ticks == [1, 2, 3, 4]
        assert [point["step"] for point in result["curve"]] == [0, 2, 4]
        assert result["curve"][0]["kl"] == pytest.approx(0.0, abs=1e-6)
        assert result["curve"][-1]["kl"] > 1e-3  # the weights that are measured are the worker's
        assert all(math.isfinite(v) for p in result["curve"] for v in p.values() if v is not None)
        assert updates[-1][1]["lr"] == 0.0  # decayed, as TRL's
        return result["curve"], updates

    yield run
    from benchmarks.study import verl_host_workers

    verl_host_workers.end()


def test_a_weighted_loss_divides_by_a_sampler_that_lags(train):
    curve, updates = train("k2@loss/is:token", 1)
    assert [metrics["kl/active"] for _, metrics in updates] == [1.0] * 4
    weights = [metrics["kl/weight/max"] for _, metrics in updates]
    assert weights[0] == pytest.approx(1.0, abs=1e-4)  # no update has been made
    assert max(weights) > 1.05
    assert curve[-1]["kl/ess"] < 0.999
    for batch, _ in updates:
        for old, sampler in zip(batch.log_probs["old_log_probs"], batch.log_probs["rollout_log_probs"], strict=True):
            assert torch.equal(old, sampler)


def test_without_delay_the_sampler_is_the_worker(train):
    _, updates = train("k2@loss/is:token")
    assert [m["kl/weight/max"] for _, m in updates] == pytest.approx([1.0] * 4, abs=1e-3)
    assert [m["clip_ratio/region_mean"] for _, m in updates] == [0.0] * 4


def test_a_bf16_sampler_is_not_quite_the_worker(train):
    _, updates = train("k2@loss/is:token", precision="bf16")
    assert all(1e-4 < m["kl/weight/max"] - 1 < 0.2 for _, m in updates)


def log_ratios(batch):
    """Log-ratios of sampler to reference, one tensor per completion."""
    pairs = zip(batch.log_probs["rollout_log_probs"], batch.log_probs["ref_log_prob"], strict=True)
    return [sampler - reference for sampler, reference in pairs]


@pytest.mark.parametrize("delay", [0, 1])
def test_a_penalty_is_subtracted_from_advantages_per_token(delay, train):
    _, updates = train("k1@advantage", delay)
    assert [m["kl/beta"] for _, m in updates] == [QUICK.beta] * 4
    assert updates[-1][1]["kl/value"] > 1e-3
    for batch, _ in updates[delay + 1 :]:
        # What a token's completion still costs; what is left is the group's advantage, the same for all its tokens.
        penalties = [ratio.flip(0).cumsum(0).flip(0) for ratio in log_ratios(batch)]
        left = [a + QUICK.beta * p for a, p in zip(batch.advantages, penalties, strict=True)]
        spread = max(float(row.max() - row.min()) for row in left)
        # The penalty is of the policy's own log-probs, which are the sampler's where that does not lag.
        assert (spread < 1e-4) == (delay == 0)


def test_a_penalty_in_the_reward_is_summed_over_the_completion(train):
    _, updates = train("k1@reward")
    assert updates[-1][1]["kl/value"] > 1e-3
    batch = updates[-1][0]
    advantages = torch.stack([row[0] for row in batch.advantages]).view(-1, QUICK.generations)
    penalties = QUICK.beta * torch.stack([ratio.sum() for ratio in log_ratios(batch)]).view(-1, QUICK.generations)
    assert advantages.abs().max() > 1e-3
    quarters = 4 * (advantages + penalties - penalties.mean(1, keepdim=True))  # of 0 or 1, less the mean of four
    torch.testing.assert_close(quarters, quarters.round(), rtol=0, atol=1e-3)


def test_an_exact_loss_starts_from_another_reference(train):
    _, updates = train("exact@loss", family="qwen2")
    assert updates[0][1]["kl/log_ratio/max"] < 1e-4  # the worker had trained the other family before
    assert updates[-1][1]["kl/exact"] > 1e-3


def test_a_top_k_loss_takes_its_numbers_from_the_references_pass(train):
    _, updates = train("exact@loss/top:8", family="qwen2")
    assert updates[0][1]["kl/log_ratio/max"] < 1e-4
    assert updates[-1][1]["kl/exact"] > 1e-3


def test_without_a_regulariser_there_is_none(train):
    curve, updates = train("none")
    assert not [key for _, metrics in updates for key in metrics if key.startswith("kl")]
    assert not [key for batch, _ in updates for key in batch.log_probs if key.startswith("ref")]
    assert curve[-1]["kl/ess"] is None
    assert curve[-1]["grad_norm"] is not None


@pytest.mark.parametrize(
    ("cell", "settings", "message"),
    [
        (Cell("sums", "llama", "k1@reward", 1), QUICK, r"k1@reward cannot be trained with a delayed .*bypass_mode"),
        (Cell("sums", "llama", "k1@advantage/future:exact"), QUICK, r"use an exact @loss spec"),
        (Cell("sums", "llama", "none"), replace(QUICK, device="cuda"), r"on the CPU alone, not on cuda"),
        (Cell("sums", "llama", "none"), replace(QUICK, loss_type="grpo"), r"no loss grpo in veRL"),
    ],
)
def test_refusals(cell, settings, message, tmp_path, cluster):
    with pytest.raises(ValueError, match=message):
        verl_host.run(cell, 1, settings, tmp_path, lambda steps: None)


@pytest.mark.parametrize("dry", [True, pytest.param(False, marks=pytest.mark.full)])
def test_the_whole_study_runs_where_neither_trl_nor_matplotlib_is(dry, tmp_path):
    scope = plan.Scope(tasks=("sums",), families=("llama",), claims=("k1-reward-stable",), host="verl")
    comparison.study(Console(quiet=True), scope, QUICK, comparison.Options(2, tmp_path, 1, dry=dry))
    if dry:
        assert not list(tmp_path.iterdir())
        return
    found = json.loads((tmp_path / "study.json").read_text())
    assert found["runs"] == 4
    assert "verl" in found["versions"]
    assert all(json.loads(f.read_text())["cell"]["host"] == "verl" for f in (tmp_path / "runs").glob("*.json"))
