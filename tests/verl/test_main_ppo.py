"""veRL's real program, from the command line to the last metric: trainer, Ray, rollout, workers."""

import re

import pytest

from tests.support.verl.main_ppo import CRITIC, KL_TYPE, LOSS, OF_TRAINER, finished, run
from tests.support.verl.ray_support import TRAINERS

SCORE = {"algorithm.use_kl_in_reward": True, "algorithm.kl_ctrl.kl_coef": 0.1}
# The sampler is flatter than the policy, so importance weights are away from 1.
MISMATCH = {"SAMPLER_SHARPNESS": "0.8"}

pytestmark = pytest.mark.timeout(900)


@pytest.mark.full
def test_grpo_with_a_weighted_loss_over_two_epochs(assets, tmp_path):
    settings = {**LOSS, KL_TYPE: "k2@loss/is:token", "actor_rollout_ref.actor.ppo_epochs": 2}
    result = run(assets, tmp_path, settings, environment=MISMATCH)
    first, second = finished(result)
    assert re.search(r"k2@loss/is:token active in veRL \S+, rank 0 of 1 .*behaviour sampler", result.output)
    for step in (first, second):
        assert step["kl/weight/max"] > 1.01
        assert 0 < step["kl/ess"] < 0.999
        assert step["actor/kl_coef"] == step["kl/beta"] == 0.1
    # The policy leaves the reference in the first update.
    assert second["kl/value"] > 0 < second["actor/kl_loss"]
    assert not [key for key in second if key.startswith("actor/kl/") or "kl_plugins" in key]


@pytest.mark.full
@pytest.mark.parametrize("version", TRAINERS)
def test_gae_with_a_critic_and_kl_in_reward(version, assets, tmp_path):
    settings = {
        **CRITIC,
        **SCORE,
        **OF_TRAINER[version],
        "algorithm.adv_estimator": "gae",
        "algorithm.kl_penalty": "k1@reward",
    }
    result = run(assets, tmp_path, settings)
    _, second = finished(result)
    assert second["actor/reward_kl_penalty"] == pytest.approx(second["kl/reverse_k1"], rel=0.5, abs=0.05)
    assert "reward site: token rewards - beta * k_t, then GAE" in result.output


@pytest.mark.full
@pytest.mark.parametrize("version", TRAINERS)
def test_advantage_and_its_controller_over_a_resume(version, assets, tmp_path):
    settings = {
        **SCORE,
        **OF_TRAINER[version],
        "algorithm.kl_penalty": "k1@advantage/beta:linear-0.1-0.5-4",
        "trainer.save_freq": 2,
    }
    steps = finished(run(assets, tmp_path, settings))
    assert [step["kl/beta"] for step in steps] == pytest.approx([0.1, 0.2])
    resumed = {**settings, "trainer.resume_mode": "auto", "trainer.total_training_steps": 3}
    (third,) = finished(run(assets, tmp_path, resumed), steps=1)
    assert third["kl/beta"] == pytest.approx(0.3)
    changed = {**resumed, "algorithm.kl_penalty": "k1@reward", "trainer.total_training_steps": 4}
    refused = run(assets, tmp_path, changed)
    assert refused.status != 0
    assert not refused.steps
    assert "was written under k1@advantage/beta:linear-0.1-0.5-4, and this run is configured with k1@reward" in (
        refused.output
    )


@pytest.mark.full
def test_loss_controller_over_a_resume_on_two_ranks_in_v0(assets, tmp_path):
    settings = {**LOSS, **OF_TRAINER["v0"], KL_TYPE: "k3@loss/beta:linear-0.1-0.5-4", "trainer.save_freq": 2}
    result = run(assets, tmp_path, settings, ranks=2)
    assert [step["kl/beta"] for step in finished(result)] == pytest.approx([0.1, 0.2])
    assert {"0", "1"} <= set(re.findall(r"rank (\d) of 2 \(pid", result.output))
    resumed = {**settings, "trainer.resume_mode": "auto", "trainer.total_training_steps": 3}
    (third,) = finished(run(assets, tmp_path, resumed, ranks=2), steps=1)
    assert third["kl/beta"] == pytest.approx(0.3)
