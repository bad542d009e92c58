"""``@advantage``: the penalty is subtracted token by token after normalisation."""

import pytest
import torch

from kl_plugins.adapters.trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from tests.trl import support
from tests.trl.test_reward import BETA, log_ratio


def rollout(trainer, config, model, folder, **changes):
    built = support.build(trainer, config, model, folder, beta=BETA, **changes)
    support.shift(built)
    inputs, gradient, _ = support.rollout_and_gradient(built)
    return built, inputs, gradient


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_token_penalty_has_the_gradient_of_k2_in_the_loss(loss_type, lora, model, tmp_path):
    settings = {"loss_type": loss_type, "lora": lora, "reward": support.zero_reward, "scale_rewards": "none"}
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
    task = torch.tensor(support.even_reward(texts)).view(2, 4)
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
    built, inputs, found = rollout(RLOOTrainer, RLOOConfig, model, tmp_path, kl=spec, reward=support.zero_reward)
    # RLOO's own KL in the reward is off, so without a task reward advantages are 0.
    assert torch.equal(inputs["advantages"], torch.zeros(8))
    u = log_ratio(built, inputs)
    penalty = u if "token" in spec else u.flip(-1).cumsum(-1).flip(-1)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    logp = built._get_per_token_logps_and_entropies(built.model, ids, attention, u.shape[1])[0]
    built.model.zero_grad()
    (BETA * (penalty * logp * inputs["completion_mask"]).sum(-1)).mean().backward()
    expected = support.gradient(built)
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_rloo_keeps_the_task_gradient(model, tmp_path):
    _, inputs, with_kl = rollout(RLOOTrainer, RLOOConfig, model, tmp_path, kl="k1@advantage")
    _, _, kl_alone = rollout(RLOOTrainer, RLOOConfig, model, tmp_path, kl="k1@advantage", reward=support.zero_reward)
    built = support.build(RLOOTrainer, RLOOConfig, model, tmp_path, beta=0.0)
    support.shift(built)
    _, task, _ = support.rollout_and_gradient(built)
    assert inputs["advantages"].abs().max() > 0
    assert (with_kl - kl_alone - task).norm() / with_kl.norm() < 1e-4


@pytest.mark.parametrize(("trainer", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_trains_over_several_epochs_of_a_rollout(trainer, config, model, tmp_path):
    built = support.build(
        trainer, config, model, tmp_path, kl="k1@advantage", max_steps=4, num_iterations=2,
        gradient_accumulation_steps=2, steps_per_generation=4,
    )  # fmt: skip
    built.train()
    assert support.log_of(built, "kl/active") == [1.0] * 4
    assert support.log_of(built, "kl/value")[-1] > 0
