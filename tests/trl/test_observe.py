"""``observe`` in TRL's whole training loop: generation, several updates per rollout, logs, checkpoints."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import trl
from packaging.version import Version
from transformers.trainer_callback import TrainerCallback

from kl_plugins import KLSpec, KLSpecError, kl_penalty
from kl_plugins.adapters import trl as adapter
from kl_plugins.adapters.top_k import KEY, unpacked
from kl_plugins.adapters.trl import top_k
from kl_plugins.adapters.trl.exact import OutputHead
from kl_plugins.kernels.backend import say_once
from kl_plugins.metrics import penalty_metrics
from kl_plugins.patches.trl import fused_head
from kl_plugins.reference import RefTopK
from kl_plugins.top_k import log_odds
from tests.support.trl import states, trainers

TIMING = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")
SETTINGS = {"num_iterations": 2, "max_steps": 3, "learning_rate": 1e-2}

BATCHED = {"per_device_train_batch_size": 4, "steps_per_generation": 2}
"""TRL then scores the eight rows of a rollout in two passes."""

K = 3
"""Tokens of 15 in the set of ``top:``, so that part of the drawn tokens lie in the bucket."""


@pytest.fixture(params=[True, False], ids=["TRL's head", "own head"])
def shared_head(request, monkeypatch):
    """``top:`` reads TRL's fused head where it knows it, and multiplies the policy's head once more elsewhere."""
    if not request.param:
        monkeypatch.setattr(fused_head, "is_known", lambda: False)
    assert fused_head.is_known() is request.param


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
        ("GRPO", "observe:exact@loss/top:3/is:token/probe:2", {"gradient_checkpointing": True}, True),
        ("GRPO", "observe:exact@loss/top:3/probe:1", {**BATCHED, "max_completion_length": 14}, False),
        ("GRPO", "observe:exact@loss/top:3/is:token", {"beta": 0.0}, True),
        ("RLOO", "observe/probe:1", {}, False),
        ("RLOO", "observe:k2@loss/is:sequence", {"normalize_advantages": True}, False),
    ],
    ids=[
        "native",
        "loss",
        "beta 0",
        "on policy",
        "advantage",
        "top-lora",
        "top",
        "top-beta 0",
        "rloo-native",
        "rloo-loss",
    ],
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


def first_step(model, folder, text, **changes):
    """What the first step logs under a text, where the policy has left its reference before."""
    torch.manual_seed(0)
    settings = {**SETTINGS, "max_steps": 1, "max_completion_length": 14, "seed": 3, **changes}
    built = trainers.build(adapter.GRPOTrainer, adapter.GRPOConfig, model, folder, kl=text, **settings)
    trainers.shift(built, 0.1)
    built.train()
    return next(entry for entry in built.state.log_history if "kl/active" in entry), built


@pytest.mark.usefixtures("shared_head")
@pytest.mark.parametrize("options", ["", "/is:token", "/horizon:sequence/is:decision", "/draws:4/is:token"])
def test_numbers_of_top_are_those_of_the_spec_that_trains(options, model, tmp_path):
    spec = f"exact@loss/top:{K}{options}"
    applied, _ = first_step(model, tmp_path, spec, **BATCHED)
    observed, _ = first_step(model, tmp_path, f"observe:{spec}/probe:1", **BATCHED)
    ours = {key: value for key, value in applied.items() if key.startswith("kl/")}
    assert {key: observed[key] for key in ours} == ours
    assert ours["kl/exact"] == ours["kl/value"] > 1e-3
    assert ours["kl/coef/max"] > 0
    assert observed["kl/observed"] == 1


@pytest.mark.usefixtures("shared_head")
@pytest.mark.parametrize("case", ["plain", "batched", "lora", "capped"])
def test_a_probe_of_top_by_hand(case, model, tmp_path):
    """The vectors of the probe, from gradients of the definition by all logits."""
    changes = {"use_bias_correction_kl": False, **{"batched": BATCHED, "lora": {"lora": True}}.get(case, {})}
    used = states.capped_model(model, tmp_path / "capped") if case == "capped" else model
    built, inputs = states.moved_on(used, tmp_path, f"observe:exact@loss/top:{K}/is:token/probe:1", **changes)
    built._kl_plugins.steps = 1
    built._metrics["train"].clear()
    graphs, join = [], built._kl_plugins.states.joined

    def joined(results, *rest):
        graphs.extend(part.requires_grad for part in results[0])
        return join(results, *rest)

    built._kl_plugins.states.joined = joined
    built.compute_loss(built.model, inputs)
    assert graphs
    assert not any(graphs), "a graph would keep memory for a backward pass that never comes"
    logged = {key: values[0] for key, values in built._metrics["train"].items() if key.startswith("kl/")}
    mask = inputs["completion_mask"].bool()
    leaf = states.log_softmax(built.model, inputs).detach().requires_grad_()
    kl, logp, ref_logp, remainder = states.by_hand(built, inputs, K, leaf.log_softmax(-1))
    assert 0 < (remainder != 0).sum() < mask.sum()
    weight = (logp - inputs["old_per_token_logps"]).detach().exp()
    u = (logp - ref_logp).detach()
    ids = unpacked(inputs[KEY]).ids

    def in_cells(total):
        (gradient,) = torch.autograd.grad(total.masked_fill(~mask, 0.0).sum(), leaf, retain_graph=True)
        kept = gradient.gather(-1, ids)
        return torch.cat([kept, gradient.sum(-1, keepdim=True) - kept.sum(-1, keepdim=True)], -1).flatten()

    own = in_cells(kl + weight * remainder * logp)
    others = {"k1": torch.ones_like(u), "k2": u, "k3": 1 - u.neg().exp(), "host": 1 - u.neg().exp()}
    for name, coefficient in others.items():
        other = in_cells(coefficient * logp)
        cosine, ratio = (own @ other) / own.norm() / other.norm(), other.norm() / own.norm()
        assert logged[f"kl/probe/{name}/cosine"] == pytest.approx(cosine.item(), rel=1e-3, abs=1e-4), name
        assert logged[f"kl/probe/{name}/norm_ratio"] == pytest.approx(ratio.item(), rel=1e-3), name
    assert 0.1 < logged["kl/probe/k2/cosine"] < 0.99
    weights = weight[mask]
    assert logged["kl/probe/token/weight"] == pytest.approx(weights.mean().item(), rel=1e-4)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_rows_of_a_head_with_a_bias(softcap, monkeypatch):
    monkeypatch.setattr(top_k, "GATHERED_BYTES", 640)  # two states at a time
    head = OutputHead(torch.randn(20, 8), torch.randn(20), 1.0, softcap)
    hidden, labels, ids = torch.randn(2, 3, 8), torch.randint(0, 20, (2, 3)), torch.randint(0, 20, (2, 3, 4))
    reference = RefTopK(ids, torch.zeros(2, 3, 4), torch.zeros(2, 3), 0.7)
    found = top_k.log_odds_of_states(hidden, head, labels, reference)
    logits = hidden @ head.weight.T + head.bias
    torch.testing.assert_close(found, log_odds(logits, labels, ids, temperature=0.7, softcap=softcap))


def test_heads_in_pieces_are_refused_where_trls_head_is_not_known(monkeypatch, tmp_path):
    monkeypatch.setattr("kl_plugins.adapters.trl.refusals.WITH_KNOWN_HEAD", Version("99"))
    monkeypatch.setattr("kl_plugins.adapters.trl.refusals._zero_3", lambda config: True)
    with pytest.raises(ValueError, match="which ZeRO-3 keeps in pieces"):
        adapter.GRPOConfig(**trainers.settings(tmp_path, kl="observe:exact@loss/top"))


def test_the_start_says_what_top_costs(model, tmp_path, capfd):
    _, built = first_step(model, tmp_path, "observe:exact@loss/top", lora=True, beta=0.0)
    receipt = built._kl_plugins.receipt()
    said = "58 numbers (232 bytes) per token from the reference's pass, and a forward pass with the adapter off"
    assert said in receipt.cost
    assert said in capfd.readouterr().err


class Reordered(adapter.GRPOTrainer):
    """Reorders what it does not know of, or drops it."""

    def _prepare_inputs(self, generation_batch):
        inputs = super()._prepare_inputs(generation_batch)
        changed = {**inputs, KEY: inputs[KEY].roll(1, 0)}
        return {key: value for key, value in changed.items() if key != KEY or self.kept}


@pytest.mark.parametrize("kept", [True, False], ids=["reordered", "dropped"])
def test_numbers_of_other_tokens_are_left_out_and_do_not_stop_the_run(kept, model, tmp_path, caplog, monkeypatch):
    say_once.cache_clear()
    monkeypatch.setattr(Reordered, "kept", kept, raising=False)
    text = {"kl": f"observe:exact@loss/top:{K}/probe:1"}
    stock = trained(trl.GRPOTrainer, trl.GRPOConfig, model, tmp_path)
    found = trained(Reordered, adapter.GRPOConfig, model, tmp_path, **text)
    assert stock[0] == found[0]
    assert [one["kl/observed"] for one in found[2]] == [0.0] * 3
    assert "so no token of it is measured (kl/observed is below 1)" in caplog.text


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


@pytest.mark.parametrize("spec", ["k2@loss", "exact@loss/top:3"])
def test_a_coefficient_that_becomes_zero_leaves_gaps_and_does_not_stop(spec, model, tmp_path):
    text = f"observe:{spec}"
    built = trainers.build(adapter.GRPOTrainer, adapter.GRPOConfig, model, tmp_path, kl=text, max_steps=3)
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
        ("observe:exact@loss", {}, "did you mean: observe:exact@loss/top"),
        ("observe:exact@loss/top", {"beta": 0.0}, "beta is 0, so TRL loads no reference model and computes no KL"),
    ],
)
def test_refusals(text, changes, says, model, tmp_path):
    with pytest.raises(ValueError, match=says):
        trainers.build(adapter.GRPOTrainer, adapter.GRPOConfig, "no/such/model", tmp_path, kl=text, **changes)


def test_rloo_has_no_pass_in_its_kl_that_top_could_be_observed_in(tmp_path):
    with pytest.raises(ValueError, match="RLOO puts its KL into the reward; use a sampled spec"):
        adapter.RLOOConfig(**trainers.settings(tmp_path, kl="observe:exact@loss/top"))


def test_a_subclass_that_makes_rollouts_of_its_own_is_refused(model, tmp_path):
    class Own(adapter.GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            return {}

    with pytest.raises(ValueError, match="its own _generate_and_score_completions never calls TRL's"):
        trainers.build(Own, adapter.GRPOConfig, "no/such/model", tmp_path, kl="observe:exact@loss/top")


def test_a_typo_fails_with_the_config(tmp_path):
    with pytest.raises(KLSpecError, match="did you mean: loss"):
        adapter.GRPOConfig(**trainers.settings(tmp_path, kl="observe:k2@los"))
