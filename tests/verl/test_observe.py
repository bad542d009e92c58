"""``observe`` in veRL's reward shaping, its config and its real program; the loss in the workers is in the contract."""

import numpy as np
import pytest
import torch
from verl.trainer.ppo import core_algos, ray_trainer
from verl.utils.config import validate_config

from kl_plugins import KLSpec, KLSpecError, kl_penalty, kl_term
from kl_plugins.adapters.verl import LOSS_KEY, SCORE_KEY
from kl_plugins.adapters.verl.explained.defaults import DEFAULTS, ESTIMATORS
from kl_plugins.adapters.verl.observe import (
    USE_LOSS,
    USE_REWARD,
    ScoreObservation,
    default_word,
    native_term,
    observed_in,
)
from kl_plugins.metrics import penalty_metrics
from kl_plugins.patches.verl.trainer import ATTRIBUTE
from tests.support.verl.configs import with_settings
from tests.support.verl.main_ppo import KL_TYPE, LOSS, finished, run
from tests.support.verl.rewards import BETA, rollout


def shaped(text):
    """veRL's reward shaping under a text with ``observe``, as its trainer sets it up."""
    control = core_algos.FixedKLController(BETA)
    found = observed_in(SCORE_KEY, text)
    setattr(control, ATTRIBUTE, ScoreObservation(found, "unused", truncated=False))
    return ray_trainer.apply_kl_penalty(rollout(), kl_ctrl=control, kl_penalty=text)


@pytest.mark.parametrize("word", ["kl", "low_var_kl", "mse"])
def test_rewards_are_verls_own_bit_by_bit(word):
    host, host_metrics = ray_trainer.apply_kl_penalty(rollout(), core_algos.FixedKLController(BETA), word)
    ours, metrics = shaped(f"{word}/observe:k1@advantage/probe:1")
    assert ours.batch.keys() == host.batch.keys()
    assert all(torch.equal(ours.batch[key], host.batch[key]) for key in host.batch.keys())  # noqa: SIM118
    assert host_metrics == {key: value for key, value in metrics.items() if not key.startswith("kl/")}
    assert (metrics["kl/observed"], metrics["kl/active"], metrics["kl/beta"]) == (1, 1, BETA)
    assert metrics["kl/probe/host/dead_frac"] == 0


@pytest.mark.parametrize("text", ["k1@advantage", "k2@loss"])
def test_metrics_by_hand(text):
    _, metrics = shaped(f"kl/observe:{text}")
    batch, spec = rollout().batch, KLSpec.parse(text)
    logp, ref, mask = batch["old_log_probs"], batch["ref_log_prob"], batch["response_mask"].bool()
    if spec.placement == "loss":
        wanted = kl_term(spec, logp, ref, mask, sampler_logp=batch["rollout_log_probs"]).metrics
    else:
        wanted = penalty_metrics(kl_penalty(spec, logp, ref, mask), logp, ref, logp, mask)
    assert {key: metrics[key] for key in wanted} == pytest.approx(
        {key: value.item() for key, value in wanted.items()}, rel=1e-4, abs=1e-6
    )


def test_observe_alone_takes_verls_default():
    assert default_word(LOSS_KEY) == DEFAULTS[LOSS_KEY]
    assert default_word(SCORE_KEY) == DEFAULTS[SCORE_KEY]
    assert str(observed_in(LOSS_KEY, "observe").observation) == "low_var_kl/observe"
    assert observed_in(LOSS_KEY, "observe").observation.measured == KLSpec.parse("k3@loss")
    assert observed_in(SCORE_KEY, "observe").observation.measured == KLSpec.parse("k1@reward")
    assert observed_in(LOSS_KEY, "k3+/observe").observation.measured == KLSpec.parse("k2@loss")


def test_every_word_of_verls_is_one_that_it_takes():
    zero = torch.zeros(1, 1)
    for word in [*ESTIMATORS, *(f"{word}+" for word in ESTIMATORS)]:
        assert native_term(LOSS_KEY, word, {}) is not None
        assert core_algos.kl_penalty(zero, zero, word).shape == (1, 1)
    assert native_term(LOSS_KEY, "k9", {}) is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({LOSS_KEY: "observe"}, "use_kl_loss is False, so veRL computes no KL in the loss"),
        ({SCORE_KEY: "kl/observe"}, "use_kl_in_reward is False"),
        ({USE_LOSS: True, LOSS_KEY: "k9/observe"}, "'k9' before observe is not one of veRL's estimators"),
        ({USE_LOSS: True, USE_REWARD: True, LOSS_KEY: "observe", SCORE_KEY: "kl/observe"}, "observe in one of the two"),
        ({USE_LOSS: True, USE_REWARD: True, LOSS_KEY: "observe", SCORE_KEY: "k1@reward"}, "observe in one of the two"),
    ],
)
def test_refusals(settings, says):
    with pytest.raises(ValueError, match=says):
        validate_config(with_settings(settings), use_reference_policy=True, use_critic=False)


def test_a_typo_ends_the_launch():
    with pytest.raises(KLSpecError, match="did you mean: loss"):
        validate_config(
            with_settings({USE_LOSS: True, LOSS_KEY: "k3/observe:k2@los"}), use_reference_policy=True, use_critic=False
        )


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_whole_run_is_observed_in_its_reward(assets, tmp_path):
    settings = {
        USE_REWARD: True,
        SCORE_KEY: "kl/observe:k2@loss/probe:1",
        "algorithm.kl_ctrl.kl_coef": 0.1,
        "trainer.total_training_steps": 2,
    }
    result = run(assets, tmp_path, settings)
    steps = finished(result, steps=2)
    assert "kl/observe:k2@loss/probe:1 observes, changes nothing, in veRL" in result.output
    assert all(np.isfinite(list(step.values())).all() for step in steps)
    assert all((step["kl/observed"], step["kl/beta"]) == (1, 0.1) for step in steps)
    assert all(step["kl/probe/host/dead_frac"] == 0 for step in steps)
    # The first rollout is the reference's own, as far as rounding goes.
    assert steps[1]["kl/value"] > steps[0]["kl/value"]
    assert steps[1]["kl/reverse_k1"] == pytest.approx(steps[1]["actor/reward_kl_penalty"], rel=0.2, abs=1e-3)
    assert "kl/probe/k2/norm_ratio" in steps[1]
    assert not list(tmp_path.rglob("kl_plugins*.json"))


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_whole_run_is_observed(assets, tmp_path):
    # Two optimizer steps, so that the second one sees a policy that has left the reference.
    settings = {
        **LOSS,
        KL_TYPE: "low_var_kl/observe:k2@loss/is:token/probe:2",
        "actor_rollout_ref.actor.ppo_epochs": 2,
        "trainer.total_training_steps": 1,
        "trainer.save_freq": 1,
    }
    result = run(assets, tmp_path, settings, environment={"SAMPLER_SHARPNESS": "0.8"})
    (step,) = finished(result, steps=1)
    assert "low_var_kl/observe:k2@loss/is:token/probe:2 observes, changes nothing, in veRL" in result.output
    assert np.isfinite(list(step.values())).all()
    assert (step["kl/observed"], step["actor/kl_coef"], step["kl/beta"]) == (1, 0.1, 0.1)
    assert step["kl/value"] > 0
    assert 0 < step["kl/probe/host/cosine"] <= 1
    assert step["kl/weight/max"] > 1.01
    assert not [key for key in step if key.startswith("actor/kl/") or "kl_plugins" in key]
    assert not list(tmp_path.rglob("kl_plugins*.json"))
