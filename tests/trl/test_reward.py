"""``@reward``: the penalty is in the rewards before they are normalised, and only there."""

import inspect

import pytest
import torch
import trl

from kl_plugins.adapters.trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from tests.support.trl import trainers
from tests.support.trl.trainers import BETA, log_ratio


def grpo(model, folder, spec="k1@reward", **changes):
    built = trainers.build(GRPOTrainer, GRPOConfig, model, folder, kl=spec, beta=BETA, **changes)
    trainers.shift(built)
    inputs, gradient, _ = trainers.rollout_and_gradient(built)
    return built, inputs, gradient


@pytest.mark.parametrize("num_iterations", [1, 2], ids=["scored by the plugin", "scored by TRL"])
@pytest.mark.parametrize("scale", ["none", "group"])
def test_enters_before_group_normalisation(scale, num_iterations, model, tmp_path):
    built, inputs, _ = grpo(
        model, tmp_path, scale_rewards=scale, num_iterations=num_iterations, reward=trainers.zero_reward
    )
    assert inputs["advantages"].shape == (8,)
    kl = log_ratio(built, inputs).sum(-1).view(2, 4)
    reward = -BETA * kl
    expected = reward - reward.mean(1, keepdim=True)
    if scale == "group":
        expected = expected / (reward.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(inputs["advantages"], expected.flatten(), rtol=1e-4, atol=1e-5)
    assert kl.abs().min() > 1e-4


def test_adds_to_the_task_reward(model, tmp_path):
    built, inputs, _ = grpo(model, tmp_path, scale_rewards="none")
    texts = built.processing_class.batch_decode(inputs["completion_ids"], skip_special_tokens=True)
    task = torch.tensor(trainers.even_reward(texts)).view(2, 4)
    reward = task - BETA * log_ratio(built, inputs).sum(-1).view(2, 4)
    expected = (reward - reward.mean(1, keepdim=True)).flatten()
    torch.testing.assert_close(inputs["advantages"], expected, rtol=1e-4, atol=1e-5)


def test_logs_the_task_reward_without_the_penalty(model, tmp_path):
    built, inputs, _ = grpo(model, tmp_path)
    texts = built.processing_class.batch_decode(inputs["completion_ids"], skip_special_tokens=True)
    task = torch.tensor(trainers.even_reward(texts))
    log = built._metrics["train"]
    assert log["reward"] == pytest.approx([task.mean().item()], rel=1e-5)
    assert log["reward_std"] == pytest.approx([task.std().item()], rel=1e-5)
    assert log["rewards/even_reward/mean"] == pytest.approx([task.mean().item()], rel=1e-5)
    assert log["rewards/kl_penalty/mean"] == pytest.approx([-log_ratio(built, inputs).sum(-1).mean().item()], rel=1e-4)
    # The extra column is gone between rollouts.
    assert built.reward_func_names == ["even_reward"]
    assert len(built.reward_weights) == 1


def test_nothing_is_left_in_the_loss(model, tmp_path):
    # Without a task reward and with one completion per group to compare with itself, no gradient may remain.
    _, inputs, gradient = grpo(model, tmp_path, reward=trainers.zero_reward, scale_rewards="none")
    with_penalty = gradient.norm()
    built = trainers.build(
        GRPOTrainer, GRPOConfig, model, tmp_path, kl="k1@reward", beta=BETA, reward=trainers.zero_reward
    )
    trainers.shift(built)
    inputs["advantages"] = torch.zeros_like(inputs["advantages"])
    built.current_gradient_accumulation_steps = 1
    built.compute_loss(built.model, inputs).backward()
    assert trainers.gradient(built).norm() == 0
    assert with_penalty > 0


def some_unscorable(completions, **_):
    return [None if i == 1 else 0.0 for i in range(len(completions))]


def test_unscorable_completions_stay_unscorable(model, tmp_path):
    from kl_plugins.adapters.trl.score import with_column

    rewards = torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan]])
    column = with_column(rewards, torch.tensor([0.5, 0.25]))[:, -1]
    assert column[0] == -0.5
    assert column[1].isnan()
    host = inspect.unwrap(inspect.getattr_static(trl.GRPOTrainer, "_generate_and_score_completions"))
    if "unscorable_mask" not in host.__code__.co_varnames:
        pytest.skip("this TRL gives unscorable completions an advantage")
    _, inputs, _ = grpo(model, tmp_path, scale_rewards="none", reward=some_unscorable)
    assert inputs["advantages"][1] == 0
    assert inputs["advantages"][0] != 0


@pytest.mark.parametrize(("trainer", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_a_changed_beta_is_used_from_the_next_rollout_on(trainer, config, model, tmp_path):
    found = []
    for beta in (BETA, 2 * BETA, 0.0):
        scaling = {"scale_rewards": "none"} if trainer is GRPOTrainer else {"normalize_advantages": False}
        built = trainers.build(
            trainer, config, model, tmp_path, kl="k1@reward", beta=BETA, reward=trainers.zero_reward, **scaling
        )
        trainers.shift(built)
        built.beta = beta
        inputs, _, _ = trainers.rollout_and_gradient(built)
        found.append(inputs["advantages"])
        assert built._metrics["train"]["kl/beta"] == pytest.approx([beta])
    assert found[0].abs().max() > 1e-3
    torch.testing.assert_close(found[1], 2 * found[0], rtol=1e-3, atol=1e-6)
    assert found[2].abs().max() == 0


@pytest.mark.parametrize("normalize", [False, True])
def test_rloo_k1_is_the_hosts_own(normalize, model, tmp_path):
    results = []
    for trainer, config, extra in (
        (trl.RLOOTrainer, trl.RLOOConfig, {}),
        (RLOOTrainer, RLOOConfig, {"kl": "k1@reward"}),
    ):
        built = trainers.build(
            trainer, config, model, tmp_path, max_steps=4, learning_rate=1e-2, normalize_advantages=normalize, **extra
        )
        built.train()
        results.append(
            trainers.log_of(built, "loss") + trainers.log_of(built, "grad_norm") + trainers.log_of(built, "reward")
        )
    host, ours = results
    assert ours == pytest.approx(host, rel=1e-4, abs=2e-6)


def test_rloo_takes_another_estimator(model, tmp_path):
    built = trainers.build(
        RLOOTrainer, RLOOConfig, model, tmp_path, kl="k3@reward/allow:biased", beta=BETA, reward=trainers.zero_reward
    )
    trainers.shift(built)
    inputs, _, _ = trainers.rollout_and_gradient(built)
    u = log_ratio(built, inputs)
    reward = -BETA * (torch.exp(-u) - 1 + u).sum(-1).view(2, 4)
    expected = reward - (reward.sum(1, keepdim=True) - reward) / 3
    torch.testing.assert_close(inputs["advantages"], expected.flatten(), rtol=1e-4, atol=1e-5)
