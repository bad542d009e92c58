"""``@loss`` in OpenRLHF's real policy worker: gradients, beta, metrics, receipts, checkpoints."""

from dataclasses import replace

import pytest
import ray
import torch

from kl_plugins import KLSpec, kl_term
from tests.support.openrlhf import by_hand
from tests.support.openrlhf.command_line import CORRECTED, LOSS, ONE_STEP, SAMPLER, SPEC

USE = LOSS[:2]
"""``--algo.kl.use_loss --algo.kl.estimator``; the spec follows."""

OLD = (
    "k2@loss",
    "k3@loss",
    "k3+@loss",
    "abs@loss",
    "jeffreys@loss",
    "k1@loss/allow:biased",
    "k2@loss/is:token",
    "k2@loss/is:token/behaviour:old/cap:1.5",
    "k2@loss/is:token/floor:0.9",
    "k2@loss/is:token/band:0.5-1.2",
    "k2@loss/is:token/norm",
    "k2@loss/clip:0.2",
    "k2@loss/is:prefix",
    "k2@loss/is:sequence/cap:5",
    "k2@loss/horizon:sequence/is:decision",
    "k2@loss/horizon:sequence/gamma:0.9/future:k3",
)
WITH_SAMPLER = (
    "k2@loss/is:token/behaviour:sampler",
    "k2@loss/is:prefix/behaviour:sampler/cap:5",
    "k2@loss/horizon:sequence/is:decision/behaviour:sampler",
    "k2@loss/clip:0.2/behaviour:sampler",
)
CASES = [(text, False) for text in OLD] + [(text, True) for text in WITH_SAMPLER]


@pytest.fixture(scope="module")
def computed(harness, rollouts):
    """What :func:`tests.support.openrlhf.by_hand.losses` finds in the worker, by spec, after the policy has moved."""
    ray.cloudpickle.register_pickle_by_value(by_hand)
    trainer = harness.start((*LOSS, *ONE_STEP, "--rollout.micro_batch_size", "8"))
    (experience,) = trainer.experience_maker.make_experience_batch(rollouts.experiences())
    harness.ask(by_hand.move, 0.004)
    (found,) = harness.ask(by_hand.losses, CASES, experience, 0.5)
    return dict(zip([text for text, _ in CASES], found, strict=True))


@pytest.mark.parametrize("text", [text for text, _ in CASES])
def test_the_gradient_is_that_of_the_core_called_by_hand(computed, text):
    equal, gradient, metrics = computed[text]
    assert equal
    assert gradient.abs().max() > 0.01
    assert metrics["logprobs_diff"] != 0


def test_specs_differ_from_one_another(computed):
    same = [
        (one, other)
        for index, one in enumerate(computed)
        for other in list(computed)[index + 1 :]
        if torch.equal(computed[one][1], computed[other][1])
    ]
    assert same == [("k2@loss", "k3+@loss")]  # another value, the same coefficient


def test_the_logged_kl_is_the_estimators_value(computed):
    # OpenRLHF's adaptive controller reads it: weights and future terms are not in it.
    assert computed["k2@loss/is:prefix"][2]["kl"] == pytest.approx(computed["k2@loss"][2]["kl"], rel=1e-5)
    assert computed["k3@loss"][2]["kl"] > 0


def test_the_kl_that_openrlhfs_controller_reads_is_a_mean_over_tokens(harness, rollouts):
    # Micro-batches of one response hold 3 to 8 tokens, and OpenRLHF's own mean counts long ones more than once.
    metrics = harness.run((*USE, "k3@loss", *ONE_STEP, "--train.micro_batch_size", "1"), rollouts).metrics[0]
    assert metrics["kl"] == pytest.approx(metrics["kl/value"], rel=1e-4)
    assert all(isinstance(metrics[key], float) for key in metrics if key.startswith("kl"))


def test_the_term_is_a_mean_over_tokens_whatever_the_policy_loss_is(harness, rollouts):
    even = replace(rollouts, rewards=[0.5] * len(rollouts.rewards))  # advantages of 0
    flags = (*USE, "k2@loss", *ONE_STEP, "--train.micro_batch_size", "8")
    other = ("--actor.loss_agg_mode", "seq-mean-token-mean")
    plain, found = (harness.run((*flags, *more), even).gradient for more in ((), other))
    assert all(value.equal(found[name]) for name, value in plain.items())
    assert any(value.abs().max() > 0.01 for value in plain.values())


def test_metrics_are_those_of_the_core(harness, rollouts):
    flags = (*USE, "k2@loss/is:token/cap:1.01", *ONE_STEP, "--train.micro_batch_size", "8", *CORRECTED)
    result = harness.run((*flags, "--rollout.micro_batch_size", "8"), rollouts)
    (batch,) = result.experiences
    logp = batch.action_log_probs  # before its first update the policy is the old one
    term = kl_term(
        KLSpec.parse("k2@loss/is:token/cap:1.01"),
        logp,
        batch.base_action_log_probs,
        batch.action_mask.bool(),
        sampler_logp=batch.rollout_log_probs,
    )
    assert term.metrics["kl/cap_frac"] > 0.1
    for key, value in term.metrics.items():
        assert result.metrics[0][key] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), key
    assert result.receipts[0].behaviour == "sampler"


def test_receipts_name_worker_target_and_behaviour(harness, rollouts):
    trainer = harness.start(SAMPLER)
    (receipt,) = harness.receipts(trainer)
    assert (receipt.spec, receipt.target) == ("k2@loss/is:token/behaviour:sampler", "reverse_kl_token_behaviour")
    assert (receipt.behaviour, receipt.rank, receipt.world_size, receipt.host) == ("sampler", 0, 1, "OpenRLHF")
    assert "ActorPPOTrainer.training_step" in receipt.patches


def test_the_specs_own_beta_moves_once_per_optimizer_step(harness, rollouts):
    flags = (*USE, "k2@loss/beta:linear-1-0-4")
    (metrics,) = harness.run(flags, rollouts).metrics  # 4 optimizer steps of 2 micro-batches each
    assert metrics["kl/beta"] == pytest.approx((1 + 0.75 + 0.5 + 0.25) / 4)
    (state,) = harness.ask(by_hand.controller)
    assert (state["step"], state["beta"]) == (4, 0)


def test_a_constant_schedule_is_the_hosts_coefficient(harness, rollouts):
    ours = harness.run((*USE, "k2@loss/beta:linear-0.5-0.5-9", "--algo.kl.init_coef", "0.1"), rollouts).parameters
    hosts = harness.run((*USE, "k2@loss", "--algo.kl.init_coef", "0.5"), rollouts).parameters
    assert all(value.equal(hosts[name]) for name, value in ours.items())


def test_openrlhfs_adaptive_controller_goes_on_with_the_specs_kl(harness, rollouts):
    flags = (*USE, "k2@loss", "--algo.kl.target", "0.01", "--algo.kl.horizon", "80")
    result = harness.run(flags, rollouts, steps=2)
    assert result.metrics[0]["kl/beta"] == 0.5
    assert result.metrics[1]["kl/beta"] == pytest.approx(0.5 * (1 + 0.2 * 8 / 80))


def test_a_checkpoint_holds_the_controller_and_resume_restores_it(harness, rollouts, tmp_path):
    checkpoints = ("--ckpt.path", str(tmp_path), "--ckpt.save_steps", "1")
    flags = (*USE, "k2@loss/beta:dual-0.1-0.01", *checkpoints)
    trainer = harness.start(flags)
    trainer.init_checkpoint_states()
    harness.train(trainer, rollouts)
    states = {"episode": 0, "global_step": 1, "total_consumed_prompts": 4, "data_loader_state_dict": {}}
    trainer.save_logs_and_checkpoints(1, {}, states)
    (left,) = harness.ask(by_hand.controller)
    assert left["step"] == 4
    resumed = harness.start((*flags, "--ckpt.load_enable"))
    assert resumed.init_checkpoint_states()["global_step"] == 1
    assert harness.ask(by_hand.controller) == [left]
    harness.start(flags).init_checkpoint_states()
    assert harness.ask(by_hand.controller)[0]["step"] == 0


def test_a_trainer_that_never_asks_for_its_states_resumes_with_its_first_step(harness, rollouts, tmp_path):
    # The async trainer's states are asked for by a remote call that no hook sees.
    flags = (*USE, "k2@loss/beta:linear-1-0-20", "--ckpt.path", str(tmp_path), "--ckpt.save_steps", "1")
    trainer = harness.start(flags)
    harness.train(trainer, rollouts)
    trainer.save_logs_and_checkpoints(1, {}, {"episode": 0, "global_step": 1})
    resumed = harness.start((*flags, "--ckpt.load_enable"))
    harness.train(resumed, rollouts)
    assert harness.ask(by_hand.controller)[0]["step"] == 8


def test_another_schedules_state_is_not_taken(harness, rollouts, tmp_path, monkeypatch):
    monkeypatch.setenv("KL_PLUGINS_ALLOW_SPEC_CHANGE", "1")
    checkpoints = ("--ckpt.path", str(tmp_path), "--ckpt.save_steps", "1")
    trainer = harness.start((*USE, "k2@loss/beta:linear-1-0-20", *checkpoints))
    trainer.init_checkpoint_states()
    trainer.save_logs_and_checkpoints(1, {}, {"episode": 0, "global_step": 1})
    harness.start((*USE, "k2@loss/beta:cosine-1-0-20", *checkpoints, "--ckpt.load_enable")).init_checkpoint_states()
    assert harness.ask(by_hand.controller)[0]["kind"] == "cosine"


def test_nothing_of_ours_is_in_a_checkpoint_without_a_spec(harness, rollouts, tmp_path):
    trainer = harness.start((SPEC, "k2", "--algo.kl.use_loss", "--ckpt.path", str(tmp_path), "--ckpt.save_steps", "1"))
    states = {"episode": 0}
    trainer.save_logs_and_checkpoints(1, {}, states)
    assert "kl_plugins" not in states
    assert "_kl_plugins" not in vars(trainer)
