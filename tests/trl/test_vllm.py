"""A real engine beside the trainer: its log-probs, not the trainer's, stand in the importance weight."""

import logging
from pathlib import Path

import pytest
import torch

from kl_plugins.adapters.trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from kl_plugins.adapters.trl.batch import PENALTY
from tests.support.trl import states, trainers

pytestmark = [pytest.mark.full, pytest.mark.vllm]

pytest.importorskip("vllm")
from tests.support.trl import vllm_support  # noqa: E402

SAMPLER, OLD = "sampling_per_token_logps", "old_per_token_logps"


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return vllm_support.build_model(tmp_path_factory.mktemp("wide"))


@pytest.fixture(autouse=True)
def _engine(monkeypatch: pytest.MonkeyPatch):
    with vllm_support.engine(monkeypatch):
        yield


def built(trainer: type, config: type, model: str, folder: Path, **changes):
    return trainers.build(trainer, config, model, folder, **vllm_support.COLOCATED, **changes)


def rolled_out(trainer, lag: bool):
    """A rollout and its loss's gradient. With `lag`, the engine still samples from the weights of an earlier policy."""
    trainers.shift(trainer, 0.02)
    found = trainers.rollout_and_gradient(trainer)
    if lag:
        # TRL hands weights over once per optimizer step; within it, the engine stays behind.
        trainers.shift(trainer, 0.02, seed=9)
        found = trainers.rollout_and_gradient(trainer)
    return found


def by_hand(trainer, inputs, behaviour: str) -> torch.Tensor:
    """Gradient of beta times k2, weighted by exp(logp - behaviour), averaged over the batch's tokens."""
    mask = inputs["completion_mask"].bool()
    logp = vllm_support.score(trainer, trainer.model, inputs)
    with torch.no_grad():
        u = logp - vllm_support.score(trainer, trainer.ref_model, inputs)
        weight = torch.exp(logp - inputs[behaviour])
    trainer.model.zero_grad()
    (trainer.beta * (weight * u * logp)[mask].sum() / mask.sum()).backward()
    return trainers.gradient(trainer)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("lag", [False, True], ids=["in step", "lagging"])
@pytest.mark.parametrize(
    ("spec", "behaviour", "other"),
    [
        ("k2@loss/is:token", SAMPLER, OLD),
        ("k2@loss/is:token/behaviour:sampler", SAMPLER, OLD),
        ("k2@loss/is:token/behaviour:old", OLD, SAMPLER),
    ],
)
def test_weight_divides_by_the_policy_that_the_spec_names(spec, behaviour, other, lag, wide_model, tmp_path):
    trainer = built(GRPOTrainer, GRPOConfig, wide_model, tmp_path, reward=trainers.zero_reward, kl=spec)
    inputs, gradient, _ = rolled_out(trainer, lag)
    gap = (inputs[OLD] - inputs[SAMPLER])[inputs["completion_mask"].bool()].abs()
    # In step, what is left is the engine's own arithmetic: bfloat16 there, float32 here.
    assert 1e-5 < gap.mean() < (10.0 if lag else 0.05)
    assert distance(gradient, by_hand(trainer, inputs, behaviour)) < 1e-5
    assert distance(gradient, by_hand(trainer, inputs, other)) > (1e-2 if lag else 1e-4)


@pytest.mark.parametrize("lag", [False, True], ids=["in step", "lagging"])
def test_the_remainder_of_top_is_weighted_against_the_engine(lag, wide_model, tmp_path):
    settings = {"reward": trainers.zero_reward, "temperature": states.TEMPERATURE}
    trainer = built(GRPOTrainer, GRPOConfig, wide_model, tmp_path, kl="exact@loss/top:3/is:token", **settings)
    inputs, gradient, _ = rolled_out(trainer, lag)
    mask = inputs["completion_mask"].bool()
    kl, logp, _, remainder = states.by_hand(trainer, inputs, 3)
    assert 0 < (remainder != 0).sum() < mask.sum()
    expected = []
    for behaviour in (SAMPLER, OLD):
        weight = torch.exp(logp - inputs[behaviour]).detach()
        trainer.model.zero_grad()
        loss = (kl + weight * remainder * logp)[mask].sum() / mask.sum()
        (trainer.beta * loss).backward(retain_graph=True)
        expected.append(trainers.gradient(trainer))
    assert distance(gradient, expected[0]) < 1e-4
    assert distance(gradient, expected[1]) > (1e-3 if lag else 1e-5)


@pytest.mark.parametrize("spec", ["exact@loss/top:3/draws:4/is:token", "exact@advantage/top:3"])
def test_a_run_with_top_trains(spec, wide_model, tmp_path):
    made = built(GRPOTrainer, GRPOConfig, wide_model, tmp_path, kl=spec, max_steps=3)
    made.train()
    assert trainers.log_of(made, "kl/active") == [1.0] * 3
    assert all(value != 0 for value in trainers.log_of(made, "kl/exact")[1:])


def test_training_reports_the_engine_as_behaviour_policy(wide_model, tmp_path, capsys, caplog):
    with caplog.at_level(logging.INFO, logger="kl_plugins"):
        trainer = built(
            GRPOTrainer, GRPOConfig, wide_model, tmp_path, kl="k2@loss/is:token", max_steps=6, num_iterations=2
        )  # fmt: skip
        trainer.train()
    receipt = next(
        line for line in (capsys.readouterr().err + caplog.text).splitlines() if "k2@loss/is:token active" in line
    )
    assert "behaviour sampler" in receipt

    def log(key: str) -> list[float]:
        return trainers.log_of(trainer, key)

    # The first step of each rollout trains the very policy that the engine holds: what is left is the engine's gap, ...
    largest = torch.tensor(log("sampling/sampling_logp_difference/max")).exp()
    assert 1 < log("kl/weight/max")[0] <= largest[0] * (1 + 1e-5)
    assert all(value > 0 for value in log("kl/trust_region"))
    assert all(value < 1 for value in log("kl/ess"))
    # ... and the second one's policy has moved on, which adds to it.
    first, second = log("kl/trust_region")[0::2], log("kl/trust_region")[1::2]
    assert all(later > sooner for sooner, later in zip(first, second, strict=True))
    assert all(value > 0 for value in log("kl/value")[1:])


def test_old_as_behaviour_ignores_the_engine(wide_model, tmp_path, capsys, caplog):
    with caplog.at_level(logging.INFO, logger="kl_plugins"):
        trainer = built(
            GRPOTrainer, GRPOConfig, wide_model, tmp_path, kl="k2@loss/is:token/behaviour:old", max_steps=1
        )  # fmt: skip
        trainer.train()
    assert "behaviour old" in capsys.readouterr().err + caplog.text
    assert trainers.log_of(trainer, "kl/weight/max") == pytest.approx([1.0], abs=1e-6)


def test_unknown_log_prob_of_the_engine_is_an_error(wide_model, tmp_path):
    trainer = built(GRPOTrainer, GRPOConfig, wide_model, tmp_path, kl="k2@loss/is:token")
    inputs, gradient, _ = rolled_out(trainer, lag=False)
    mask = inputs["completion_mask"].bool()
    # TRL turns a log-prob that the engine did not give into NaN.
    padding = {**inputs, SAMPLER: inputs[SAMPLER].masked_fill(~mask, float("nan"))}
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, padding).backward()
    assert torch.equal(trainers.gradient(trainer), gradient)
    unknown = inputs[SAMPLER].clone()
    unknown[0, 0] = float("nan")
    with pytest.raises(ValueError, match=rf"sampler on 1 of {mask.sum()} response tokens.*behaviour:old"):
        trainer.compute_loss(trainer.model, {**inputs, SAMPLER: unknown})


@pytest.mark.parametrize(
    ("trainer", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)], ids=["GRPO", "RLOO"]
)
@pytest.mark.parametrize("spec", ["k1@reward", "k1@advantage"])
def test_penalty_in_the_score_uses_the_trainers_log_probs(spec, trainer, config, wide_model, tmp_path):
    made = built(trainer, config, wide_model, tmp_path, kl=spec)
    inputs, _, _ = rolled_out(made, lag=True)
    mask = inputs["completion_mask"].bool()
    with torch.no_grad():
        logp = vllm_support.score(made, made.model, inputs)
        u = (logp - vllm_support.score(made, made.ref_model, inputs)).masked_fill(~mask, 0.0)
    expected = u if spec == "k1@reward" else u.flip(-1).cumsum(-1).flip(-1).masked_fill(~mask, 0.0)
    torch.testing.assert_close(inputs[PENALTY], expected, rtol=1e-4, atol=1e-5)
    if SAMPLER in inputs:
        assert (logp - inputs[SAMPLER])[mask].abs().mean() > 1e-2, "the engine's would have been others"


@pytest.mark.parametrize("spec", ["k1@reward", "k1@advantage"])
def test_rloo_trains_beside_an_engine(spec, wide_model, tmp_path):
    made = built(RLOOTrainer, RLOOConfig, wide_model, tmp_path, kl=spec, max_steps=3)
    made.train()
    assert trainers.log_of(made, "kl/active") == [1.0] * 3
    assert trainers.log_of(made, "kl/value")[-1] > 0
