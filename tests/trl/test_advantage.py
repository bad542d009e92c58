"""``@advantage``: the penalty is subtracted token by token after normalisation."""

import pytest
import torch
import trl
from packaging.version import Version

from kl_plugins.adapters.trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from kl_plugins.adapters.trl.refusals import LUSPO_MASKS_PADDING
from tests.support.trl import trainers
from tests.support.trl.trainers import BETA, log_ratio


def rollout(trainer, config, model, folder, **changes):
    built = trainers.build(trainer, config, model, folder, beta=BETA, **changes)
    trainers.shift(built)
    inputs, gradient, _ = trainers.rollout_and_gradient(built)
    return built, inputs, gradient


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_token_penalty_has_the_gradient_of_k2_in_the_loss(loss_type, lora, model, tmp_path):
    settings = {"loss_type": loss_type, "lora": lora, "reward": trainers.zero_reward, "scale_rewards": "none"}
    _, _, loss = rollout(GRPOTrainer, GRPOConfig, model, tmp_path, kl="k2@loss", **settings)
    spec = "k1@advantage/horizon:token"
    _, inputs, score = rollout(GRPOTrainer, GRPOConfig, model, tmp_path, kl=spec, **settings)
    assert inputs["advantages"].shape == inputs["completion_ids"].shape
    assert loss.norm() > 1e-4
    assert (score - loss).norm() / loss.norm() < 1e-5


@pytest.mark.parametrize("num_iterations", [1, 2], ids=["scored by the plugin", "scored by TRL"])
def test_sequence_penalty_is_the_sum_of_what_follows(num_iterations, model, tmp_path):
    settings = {"scale_rewards": "none", "num_iterations": num_iterations}
    built, inputs, _ = rollout(GRPOTrainer, GRPOConfig, model, tmp_path, kl="k1@advantage/gamma:0.5", **settings)
    texts = built.processing_class.batch_decode(inputs["completion_ids"], skip_special_tokens=True)
    task = torch.tensor(trainers.even_reward(texts)).view(2, 4)
    task = (task - task.mean(1, keepdim=True)).flatten()
    u = log_ratio(built, inputs)
    penalty = torch.zeros_like(u)
    for t in reversed(range(u.shape[1])):
        penalty[:, t] = u[:, t] + (0.5 * penalty[:, t + 1] if t + 1 < u.shape[1] else 0)
    mask = inputs["completion_mask"].bool()
    expected = (task.unsqueeze(1) - BETA * penalty)[mask]
    torch.testing.assert_close(inputs["advantages"][mask], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", ["k1@advantage", "k1@advantage/horizon:token"])
def test_rloo_gradient_is_that_of_per_token_advantages(spec, model, tmp_path):
    built, inputs, found = rollout(RLOOTrainer, RLOOConfig, model, tmp_path, kl=spec, reward=trainers.zero_reward)
    # RLOO's own KL in the reward is off, so without a task reward advantages are 0.
    assert torch.equal(inputs["advantages"], torch.zeros(8))
    u = log_ratio(built, inputs)
    penalty = u if "token" in spec else u.flip(-1).cumsum(-1).flip(-1)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    logp = built._get_per_token_logps_and_entropies(built.model, ids, attention, u.shape[1])[0]
    built.model.zero_grad()
    (BETA * (penalty * logp * inputs["completion_mask"]).sum(-1)).mean().backward()
    expected = trainers.gradient(built)
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_rloo_keeps_the_task_gradient(model, tmp_path):
    _, inputs, with_kl = rollout(RLOOTrainer, RLOOConfig, model, tmp_path, kl="k1@advantage")
    _, _, kl_alone = rollout(RLOOTrainer, RLOOConfig, model, tmp_path, kl="k1@advantage", reward=trainers.zero_reward)
    built = trainers.build(RLOOTrainer, RLOOConfig, model, tmp_path, beta=0.0)
    trainers.shift(built)
    _, task, _ = trainers.rollout_and_gradient(built)
    assert inputs["advantages"].abs().max() > 0
    assert (with_kl - kl_alone - task).norm() / with_kl.norm() < 1e-4


@pytest.mark.parametrize(("trainer", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_trains_over_several_epochs_of_a_rollout(trainer, config, model, tmp_path):
    built = trainers.build(
        trainer, config, model, tmp_path, kl="k1@advantage", max_steps=4, num_iterations=2,
        gradient_accumulation_steps=2, steps_per_generation=4,
    )  # fmt: skip
    built.train()
    assert trainers.log_of(built, "kl/active") == [1.0] * 4
    assert trainers.log_of(built, "kl/value")[-1] > 0


def policy_log_probs(built, inputs):
    """(B, T) log-probs of the completions with their graph, by TRL's own function."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    return built._get_per_token_logps_and_entropies(built.model, ids, attention, inputs["completion_ids"].shape[1])[0]


@pytest.mark.parametrize("epsilon", [0.2, 1e-3], ids=["within the clip", "clipped"])
@pytest.mark.parametrize("spec", ["k1@advantage", "k1@advantage/horizon:token"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo", "luspo", "cispo"])
def test_a_sequence_ratio_leaves_each_token_its_own_penalty(loss_type, spec, epsilon, model, tmp_path):
    settings = {"loss_type": loss_type, "importance_sampling_level": "sequence", "scale_rewards": "none"}
    settings |= {"num_iterations": 2, "epsilon": epsilon, "epsilon_high": 5.0 if loss_type == "cispo" else epsilon}
    if loss_type == "luspo" and Version(trl.__version__) < LUSPO_MASKS_PADDING:
        pytest.skip("refused in this TRL")
    built, inputs, _ = rollout(GRPOTrainer, GRPOConfig, model, tmp_path, kl=spec, **settings)
    task = torch.tensor(list(built._logs["advantages"]))
    u, mask = log_ratio(built, inputs), inputs["completion_mask"].bool()
    penalty = u if "token" in spec else u.flip(-1).cumsum(-1).flip(-1)
    for updates in (0, 3):
        for update in range(updates):
            trainers.shift(built, 0.02, seed=20 + update)
        logp = policy_log_probs(built, inputs)
        length = mask.sum(-1)
        log_ratios = ((logp - inputs["old_per_token_logps"]) * mask).sum(-1) / length
        ratio = log_ratios.exp().detach()
        assert (ratio - 1).abs().max() > 5e-3 or not updates
        clip = ratio.clamp(1 - epsilon, 1 + epsilon)
        clipped = ratio * task > clip * task
        if loss_type == "cispo":
            clip, clipped = ratio, clipped & False
        # The task's own gradient stops where the host clips; the penalty keeps the weight that the host then uses.
        weight = torch.where(clipped, clip, ratio).unsqueeze(1)
        tokens = (ratio * ~clipped * task).unsqueeze(1) - BETA * weight * penalty
        per_sequence = (tokens * logp * mask).sum(-1)
        total = {
            "grpo": (per_sequence / length).mean(),
            "luspo": per_sequence.mean(),
            "dr_grpo": per_sequence.sum() / (len(mask) * built.max_completion_length),
        }.get(loss_type, per_sequence.sum() / mask.sum())
        built.model.zero_grad()
        (-total).backward()
        expected = trainers.gradient(built)
        built.model.zero_grad()
        built.compute_loss(built.model, inputs).backward()
        found = trainers.gradient(built)
        assert expected.norm() > 1e-4
        assert (found - expected).norm() / expected.norm() < 1e-4


def test_a_changed_beta_is_used_from_the_next_rollout_on(model, tmp_path):
    built, _, _ = rollout(GRPOTrainer, GRPOConfig, model, tmp_path, kl="k1@advantage", reward=trainers.zero_reward)
    built.beta = 2 * BETA
    inputs, _, _ = trainers.rollout_and_gradient(built)
    u, mask = log_ratio(built, inputs), inputs["completion_mask"].bool()
    expected = -2 * BETA * u.flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(inputs["advantages"][mask], expected[mask], rtol=1e-4, atol=1e-5)
    assert built._metrics["train"]["kl/beta"] == pytest.approx([1.5 * BETA])  # two rollouts since the last log


@pytest.mark.parametrize(("trainer", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_the_logged_beta_is_the_rollouts(trainer, config, model, tmp_path):
    spec = "k1@advantage/beta:linear-0-0.8-4"
    built = trainers.build(trainer, config, model, tmp_path, kl=spec, max_steps=8, num_iterations=4)
    built.train()
    assert trainers.log_of(built, "kl/beta") == pytest.approx([0.0] * 4 + [0.8] * 4)


def test_split_batches_take_their_rollouts_beta_with_them(model, tmp_path):
    built = trainers.build(
        GRPOTrainer, GRPOConfig, model, tmp_path, kl="k1@reward/beta:linear-0-0.8-4", max_steps=8,
        gradient_accumulation_steps=1, steps_per_generation=2,
    )  # fmt: skip
    built.train()
    assert trainers.log_of(built, "kl/beta") == pytest.approx([0, 0, 0.4, 0.4, 0.8, 0.8, 0.8, 0.8])
