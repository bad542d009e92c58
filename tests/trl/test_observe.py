"""``observe`` in TRL's whole training loop: generation, several updates per rollout, logs, checkpoints."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import trl
from transformers.trainer_callback import TrainerCallback

from kl_plugins import KLSpec, KLSpecError, kl_penalty
from kl_plugins.adapters import trl as adapter
from kl_plugins.metrics import penalty_metrics
from tests.support.trl import trainers

TIMING = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")
SETTINGS = {"num_iterations": 2, "max_steps": 3, "learning_rate": 1e-2}


def trained(trainer, config, model, folder, lora=False, **changes):
    """The log without times and without our metrics, the weights, and our metrics by step."""
    torch.manual_seed(0)
    built = trainers.build(trainer, config, model, folder, lora=lora, **{**SETTINGS, **changes})
    built.train()
    logs = [{k: v for k, v in entry.items() if k not in TIMING} for entry in built.state.log_history]
    ours = [{k: v for k, v in entry.items() if k.startswith("kl/")} for entry in logs if "loss" in entry]
    host = [{k: v for k, v in entry.items() if not k.startswith("kl/")} for entry in logs]
    return host, [p.detach().clone() for p in built.model.parameters()], ours


@pytest.mark.parametrize(
    ("algorithm", "text", "changes", "lora"),
    [
        ("GRPO", "observe", {}, False),
        ("GRPO", "observe:k2@loss/is:token/probe:2", {"loss_type": "grpo", "use_bias_correction_kl": False}, True),
        ("GRPO", "observe:k2@loss/is:token", {"beta": 0.0}, True),
        ("GRPO", "observe:k2@loss/is:token", {"num_iterations": 1}, False),  # TRL keeps no old log-probs
        ("GRPO", "observe:k1@advantage/probe:1", {"top_entropy_quantile": 0.5}, False),
        ("RLOO", "observe/probe:1", {}, False),
        ("RLOO", "observe:k2@loss/is:sequence", {"normalize_advantages": True}, False),
    ],
    ids=["native", "loss", "beta 0", "on policy", "advantage", "rloo-native", "rloo-loss"],
)
def test_training_is_stock_bit_by_bit(algorithm, text, changes, lora, model, tmp_path):
    names = f"{algorithm}Trainer", f"{algorithm}Config"
    stock = trained(*(getattr(trl, name) for name in names), model, tmp_path, lora, **changes)
    found = trained(*(getattr(adapter, name) for name in names), model, tmp_path, lora, kl=text, **changes)
    assert stock[0] == found[0]
    assert stock[0][0]["grad_norm"] > 0
    assert all(map(torch.equal, stock[1], found[1]))
    assert not any(stock[2])
    assert all(one["kl/observed"] == 1 and one["kl/active"] == 1 for one in found[2])
    assert found[2][-1]["kl/value"] > 0
    assert found[2][-1]["kl/beta"] == changes.get("beta", trainers.BETA)


@pytest.mark.parametrize("changes", [{}, {"beta": 0.0}], ids=["beta", "beta 0"])
def test_dropout_draws_the_same_numbers(changes, model, tmp_path):
    # With beta 0 the reference is scored for the observation alone, by a pass that has dropout.
    folder = shutil.copytree(model, tmp_path / "with-dropout")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    stock = trained(trl.GRPOTrainer, trl.GRPOConfig, str(folder), tmp_path, True, **changes)
    text = {"kl": "observe:k2@loss/is:token"}
    found = trained(adapter.GRPOTrainer, adapter.GRPOConfig, str(folder), tmp_path, True, **text, **changes)
    assert stock[0] == found[0]
    assert all(map(torch.equal, stock[1], found[1]))


@pytest.mark.parametrize("weighted", [False, True], ids=["k3", "k3 times the ratio"])
def test_observe_alone_measures_what_trl_does(weighted, model, tmp_path):
    classes = adapter.GRPOTrainer, adapter.GRPOConfig
    host, _, found = trained(*classes, model, tmp_path, kl="observe/probe:1", use_bias_correction_kl=weighted)
    assert len(found) == 3
    if not weighted:  # TRL logs the mean of its KL; with the ratio that is no mean of k3
        assert [one["kl/value"] for one in found] == pytest.approx([one["kl"] for one in host[:3]], rel=1e-4, abs=1e-7)
    assert found[-1]["kl/probe/host/cosine"] == pytest.approx(1.0)
    assert found[-1]["kl/probe/host/norm_ratio"] == pytest.approx(1.0)
    assert (found[-1]["kl/probe/k3/cosine"] == pytest.approx(1.0)) is not weighted


def test_rloo_by_hand(model, tmp_path):
    built = trainers.build(
        adapter.RLOOTrainer, adapter.RLOOConfig, model, tmp_path, kl="observe:k1@advantage", max_steps=2,
        num_iterations=1, learning_rate=1e-2,
    )  # fmt: skip
    trainers.shift(built)
    inputs, _, _ = trainers.rollout_and_gradient(built)
    u = trainers.log_ratio(built, inputs)
    mask, zero = inputs["completion_mask"].bool(), torch.zeros_like(u)
    wanted = penalty_metrics(kl_penalty(KLSpec.parse("k1@advantage"), u, zero, mask), u, zero, u, mask)
    logged = {key: values[0] for key, values in built._metrics["train"].items() if key.startswith("kl/")}
    for key, value in wanted.items():
        if key != "kl/disagree":
            assert logged[key] == pytest.approx(value.item(), rel=1e-4, abs=1e-5), key


class Steps(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.beta = (0.2, 0.0, 0.0)[state.global_step]


def test_a_coefficient_that_becomes_zero_leaves_gaps_and_does_not_stop(model, tmp_path):
    built = trainers.build(adapter.GRPOTrainer, adapter.GRPOConfig, model, tmp_path, kl="observe:k2@loss", max_steps=3)
    built.add_callback(Steps(built))
    built.train()
    # The first rollout is scored under the reference, because beta is set to 0 after the first step only.
    assert trainers.log_of(built, "kl/observed")[0] == 1
    assert trainers.log_of(built, "kl/observed")[-1] == 0


def test_resume_with_and_without(model, tmp_path):
    def run(folder, text, steps, checkpoint=None):
        saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": steps, "learning_rate": 1e-2}
        built = trainers.build(adapter.GRPOTrainer, adapter.GRPOConfig, model, folder, kl=text, **saving)
        built.train(resume_from_checkpoint=checkpoint)
        return [p.detach().clone() for p in built.model.parameters()]

    whole = run(tmp_path / "whole", None, 2)
    cases = {"to": ("observe", None), "from": (None, "observe"), "both": ("observe", "observe/probe:1")}
    for name, (first, then) in cases.items():
        folder = tmp_path / name
        run(folder, first, 1)
        assert all(map(torch.equal, run(folder, then, 2, str(folder / "checkpoint-1")), whole)), name


@pytest.mark.parametrize(
    ("text", "changes", "says"),
    [
        ("observe:k2@loss", {"beta": 0.0}, "beta is 0, so TRL loads no reference model and computes no KL"),
        ("observe", {"beta": 0.0}, "no KL of its own that observe could measure"),
        ("k3/observe", {}, "leave 'k3' out"),
        ("observe:k2@loss/behaviour:sampler/is:token", {}, "needs the sampler's log-probs"),
    ],
)
def test_refusals(text, changes, says, model, tmp_path):
    with pytest.raises(ValueError, match=says):
        trainers.build(adapter.GRPOTrainer, adapter.GRPOConfig, "no/such/model", tmp_path, kl=text, **changes)


def test_a_typo_fails_with_the_config(tmp_path):
    with pytest.raises(KLSpecError, match="did you mean: loss"):
        adapter.GRPOConfig(**trainers.settings(tmp_path, kl="observe:k2@los"))
