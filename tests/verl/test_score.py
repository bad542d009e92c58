"""``@reward`` and ``@advantage`` where veRL shapes rewards and computes advantages, on its own functions."""

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo import core_algos, ray_trainer

from kl_plugins import KLSpec, kl_penalty
from kl_plugins.adapters.checkpoints import read_state, record, resumed, write_state
from kl_plugins.adapters.controller import BetaChangedError
from kl_plugins.adapters.log_probs import LogProbError
from kl_plugins.adapters.verl import refusals
from kl_plugins.adapters.verl.score import PENALTY, ScoreController
from tests.support.verl.ray_support import TRAINERS
from tests.support.verl.rewards import BETA, ROWS, rollout

ALGORITHM = OmegaConf.create({"use_pf_ppo": False, "gamma": 1.0})


def shaped(text, data=None, control=None):
    data = rollout() if data is None else data
    control = control or ScoreController(KLSpec.parse(text), core_algos.FixedKLController(BETA))
    return ray_trainer.apply_kl_penalty(data, kl_ctrl=control, kl_penalty=text)


def penalty_by_hand(text, data):
    batch = data.batch
    return kl_penalty(KLSpec.parse(text), batch["old_log_probs"], batch["ref_log_prob"], batch["response_mask"])


def test_k1_in_reward_is_verls_own():
    host, host_metrics = ray_trainer.apply_kl_penalty(rollout(), core_algos.FixedKLController(BETA), "kl")
    ours, metrics = shaped("k1@reward")
    assert torch.equal(ours.batch["token_level_rewards"], host.batch["token_level_rewards"])
    assert host_metrics.items() <= metrics.items()
    assert (metrics["kl/active"], metrics["kl/ess"], metrics["kl/beta"]) == (1, pytest.approx(1), BETA)
    assert metrics["kl/reverse_k1"] == pytest.approx(metrics["kl/coef/mean"], rel=1e-5)


@pytest.mark.parametrize("estimator", ["grpo", "gae", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"])
@pytest.mark.parametrize("version", TRAINERS)
@pytest.mark.parametrize("text", ["k1@advantage", "k1@advantage/gamma:0.5/future:k3"])
def test_advantage_penalty_comes_after_normalisation(estimator, version, text):
    def advantages(data):
        if version == "v0":
            return ray_trainer.compute_advantage(data, adv_estimator=estimator, num_repeat=2, config=ALGORITHM)
        from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

        keys = [f"{uid}_{row % 2}_0" for row, uid in enumerate(data.non_tensor_batch["uid"])]
        return compute_advantage_for_multi_trajectories(
            data, batch_keys=keys, adv_estimator=estimator, num_repeat=2, config=ALGORITHM
        )

    stock = rollout()
    stock.batch["token_level_rewards"] = stock.batch["token_level_scores"]
    stock = advantages(stock)
    ours, metrics = shaped(text)
    assert torch.equal(ours.batch["token_level_rewards"], ours.batch["token_level_scores"])
    assert metrics["actor/reward_kl_penalty_coeff"] == BETA
    by_hand = penalty_by_hand(text, ours)
    assert by_hand.abs().max() > 0.1
    ours = advantages(ours)
    assert torch.equal(ours.batch["advantages"], stock.batch["advantages"] - BETA * by_hand)
    assert torch.equal(ours.batch["returns"], stock.batch["returns"])
    assert PENALTY not in ours.batch.keys()  # noqa: SIM118  a TensorDict


def test_a_penalty_that_no_advantage_takes_is_pending():
    control, other = (
        ScoreController(KLSpec.parse("k1@advantage"), core_algos.FixedKLController(BETA)) for _ in range(2)
    )
    data, _ = shaped("k1@advantage", control=control)
    left, _ = shaped("k1@advantage", control=other)
    assert control.pending
    ray_trainer.compute_advantage(data, adv_estimator="grpo", config=ALGORITHM)
    assert not control.pending
    assert other.pending, "whose batch was not used"
    assert PENALTY in left.meta_info
    assert PENALTY not in data.meta_info


@pytest.mark.parametrize("text", ["k1@advantage", "k1@advantage/future:k3/gamma:0.5"])
def test_verls_own_controller_sees_the_kl_per_token_although_nothing_is_subtracted(text):
    _, host_metrics = ray_trainer.apply_kl_penalty(rollout(), core_algos.FixedKLController(BETA), "kl")
    kl = host_metrics["actor/reward_kl_penalty"]
    # 10 % above the target, inside the 20 % at which the controller's error saturates.
    controllers = [core_algos.AdaptiveKLController(BETA, target_kl=kl / 1.1, horizon=100) for _ in range(2)]
    ray_trainer.apply_kl_penalty(rollout(), controllers[0], "kl")
    assert controllers[0].value == pytest.approx(BETA * (1 + 0.1 * ROWS / 100), rel=1e-6)
    _, metrics = shaped(text, control=ScoreController(KLSpec.parse(text), controllers[1]))
    assert controllers[1].value == pytest.approx(controllers[0].value, rel=1e-6)
    assert metrics["actor/reward_kl_penalty"] == pytest.approx(kl, rel=1e-5)
    assert metrics["actor/reward_kl_penalty_coeff"] == metrics["kl/beta"] == BETA


def advantages_of(estimator, data):
    """Advantages by one of veRL's estimators; what only some of them read is there as well."""
    mask = data.batch["response_mask"]
    if estimator == "remax":
        data.batch["reward_baselines"] = torch.zeros(ROWS)
    data.batch["sum_pi_squared"] = torch.full(mask.shape, 0.5)
    data.batch["prompts"] = torch.ones(ROWS, 2)
    data.batch["attention_mask"] = torch.cat([torch.ones(ROWS, 2, dtype=torch.long), mask], -1)
    data.non_tensor_batch["component"] = data.batch["token_level_scores"].sum(-1).numpy()
    config = OmegaConf.create({"use_pf_ppo": False, "gamma": 1.0, "gdpo_reward_keys": ["component"]})
    return ray_trainer.compute_advantage(data, adv_estimator=estimator, num_repeat=2, config=config).batch["advantages"]


def sees_every_kl(estimator):
    """Whether the advantages of each response change with its own KL; veRL's estimators, on veRL's rewards."""
    for row in range(ROWS):
        found = []
        for shift in (0.0, 0.7):
            data = rollout()
            data.batch["ref_log_prob"][row] -= shift
            data.non_tensor_batch["uid"] = np.array([*"aaabbb"], dtype=object)  # of two, only their order counts
            ours, _ = shaped("k1@reward", data)
            found.append(advantages_of(estimator, ours)[row][data.batch["response_mask"][row].bool()])
        if torch.allclose(found[0], found[1], atol=1e-4):
            return False
    return True


def test_reward_is_allowed_with_the_estimators_that_see_the_kl_of_every_response():
    seeing = {name for name in core_algos.ADV_ESTIMATOR_REGISTRY if sees_every_kl(name)}
    assert seeing == set(refusals.REWARD_ESTIMATORS)
    assert set(core_algos.ADV_ESTIMATOR_REGISTRY) - seeing == set(refusals.WITHOUT_KL)


def test_the_specs_schedule_controls_beta_and_survives_a_checkpoint(tmp_path):
    text = "k1@reward/beta:linear-0-1-4"

    def new():
        return ScoreController(KLSpec.parse(text), core_algos.FixedKLController(BETA))

    control, seen = new(), []
    for _ in range(3):
        _, metrics = shaped(text, control=control)
        seen.append(metrics["actor/reward_kl_penalty_coeff"])
    assert seen == [0, 0.25, 0.5]
    path = tmp_path / "step" / "state.json"
    write_state(path, record(control.spec, control.saved()))
    later = new()
    later.restore(resumed(read_state(path), later.spec))
    assert later.value == control.value == 0.75


def test_the_specs_controller_counts_responses_that_have_a_token():
    control = ScoreController(KLSpec.parse("k1@reward/beta:adaptive-0.001-10"), core_algos.FixedKLController(BETA))
    data = rollout()
    data.batch["response_mask"][4] = 0
    shaped(str(control.spec), data, control)
    assert control.value == pytest.approx(BETA * (1 + 0.2 * (ROWS - 1) / 10))


def test_a_changed_coefficient_is_used_and_is_an_error_beside_a_schedule():
    host = core_algos.FixedKLController(BETA)
    control = ScoreController(KLSpec.parse("k1@advantage"), host)
    host.value = BETA / 2
    _, metrics = shaped("k1@advantage", control=control)
    assert metrics["kl/beta"] == metrics["actor/reward_kl_penalty_coeff"] == BETA / 2
    host = core_algos.FixedKLController(BETA)
    text = "k1@advantage/beta:linear-0-1-4"
    control = ScoreController(KLSpec.parse(text), host)
    host.value = BETA / 2
    with pytest.raises(BetaChangedError, match=r"algorithm\.kl_ctrl\.kl_coef was changed from 0\.3 to 0\.15"):
        shaped(text, control=control)


def test_verls_adaptive_value_survives_a_checkpoint_and_a_fixed_one_follows_the_config(tmp_path):
    spec = KLSpec.parse("k1@reward")
    before = ScoreController(spec, core_algos.AdaptiveKLController(0.7, 1.0, 10))
    after = ScoreController(spec, core_algos.AdaptiveKLController(0.1, 1.0, 10))
    after.restore(json.loads(json.dumps(before.saved())), host_value=True)
    assert after.value == 0.7
    fixed = ScoreController(spec, core_algos.FixedKLController(0.1))
    fixed.restore(ScoreController(spec, core_algos.FixedKLController(0.7)).saved(), host_value=False)
    assert fixed.value == 0.1


def test_a_damaged_state_file_is_named(tmp_path):
    (tmp_path / "kl_plugins.json").write_text('{"beta":')
    with pytest.raises(ValueError, match=r"kl_plugins\.json is damaged"):
        read_state(tmp_path / "kl_plugins.json")


def test_a_log_prob_that_is_not_finite_stops_the_run():
    data = rollout()
    data.batch["old_log_probs"][0, 1] = torch.nan
    with pytest.raises(LogProbError, match=r"the policy on 1 of 20 response tokens are not finite"):
        shaped("k1@reward", data)
    data = rollout()
    data.batch["old_log_probs"][4, 3] = torch.nan  # padding
    ours, _ = shaped("k1@advantage", data)
    assert torch.isfinite(ours.batch[PENALTY]).all()


def test_a_trainer_that_was_not_checked_is_refused():
    with pytest.raises(RuntimeError, match="a trainer that kl-plugins has not checked"):
        ray_trainer.apply_kl_penalty(rollout(), core_algos.FixedKLController(BETA), "k1@reward")


def test_a_spec_outside_the_seams_is_an_error_and_native_names_are_not():
    logp = torch.zeros(1, 2)
    with pytest.raises(RuntimeError, match="reached veRL's KL function from a place"):
        core_algos.kl_penalty(logp, logp, "k2@loss")
    with pytest.raises(NotImplementedError):
        core_algos.kl_penalty(logp, logp, "k4")
    assert torch.equal(core_algos.kl_penalty(logp, logp, kl_penalty="k2"), logp)
