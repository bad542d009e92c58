"""Exact terms: the full-vocabulary KL of every state, from the heads of TRL's own models."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kl_plugins import KLSpec, kl_penalty, kl_term
from kl_plugins.adapters.trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from kl_plugins.adapters.trl import exact as adapter
from tests.support.trl import trainers
from tests.support.trl.states import TEMPERATURE, by_hand, capped_model, moved_on

SPECS = [
    "exact@loss",
    "exact@loss/is:prefix/behaviour:old",
    "exact@loss/horizon:sequence",
    "exact@loss/horizon:sequence/is:decision/behaviour:old",
    "k2@loss/horizon:sequence/future:exact/is:sequence/behaviour:old",
]


def tokenizer_of(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def scaled_model(name: str, model: str, folder: Path) -> str:
    """A tiny model of a family in ``SCALED`` with the usual tokenizer; skips where transformers has none."""
    import transformers

    if not hasattr(transformers, f"{name}ForCausalLM"):
        pytest.skip(f"this transformers has no {name}")
    tokenizer = tokenizer_of(model)
    special = {key: getattr(tokenizer, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes, **heads, **special, **SCALED[name])
    made = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        made.get_output_embeddings().weight.mul_(4.0)  # sharper, so that a factor makes a difference
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def check_gradient(built: Any, inputs: dict[str, Any], spec: str) -> None:
    built._metrics["train"].clear()
    built.compute_loss(built.model, inputs).backward()
    ours = trainers.gradient(built)
    mask = inputs["completion_mask"].bool()
    assert 0 < mask.sum() < mask.numel(), "completions should end at different lengths"
    kl, logp, *_ = by_hand(built, inputs)
    old = inputs["old_per_token_logps"]
    term = kl_term(KLSpec.parse(spec), logp, inputs["ref_per_token_logps"], mask, old_logp=old, exact=kl)
    built.model.zero_grad()
    (built.beta * term.loss.sum() / inputs["num_items_in_batch"]).backward()
    expected = trainers.gradient(built)
    assert expected.norm() > 0
    assert (ours - expected).norm() / expected.norm() < 1e-4
    assert built._metrics["train"]["kl/exact"][-1] == pytest.approx(float(kl.detach().sum() / mask.sum()), rel=1e-4)


@pytest.mark.parametrize("spec", SPECS)
def test_gradient_is_that_of_the_full_softmax(spec, model, tmp_path):
    check_gradient(*moved_on(model, tmp_path, spec), spec)


def test_soft_cap_of_the_model_is_kept(model, tmp_path):
    built, inputs = moved_on(capped_model(model, tmp_path / "capped"), tmp_path, "exact@loss")
    assert built.model.config.final_logit_softcapping == 2.0
    check_gradient(built, inputs, "exact@loss")


SCALED = {
    "HyperCLOVAX": {"logits_scaling": 1.5},  # multiplies by what Granite divides by
    "Granite": {"logits_scaling": 1.5},
    "Cohere": {"logit_scale": 0.6},
    "NanoChat": {"final_logit_softcapping": 2.0},
}
"""Models that do more to their logits than their head, and the settings of it."""


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("spec", ["exact@loss", "exact@loss/top:15"])
def test_a_factor_on_the_logits_is_read_as_the_model_means_it(name, spec, model, tmp_path):
    built, inputs = moved_on(scaled_model(name, model, tmp_path / name), tmp_path, spec)
    check_gradient(built, inputs, spec.split("/")[0])


def test_a_bias_of_the_head_is_scaled_too(model, tmp_path):
    granite = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(
        scaled_model("Granite", model, tmp_path / "granite")
    )
    head = granite.get_output_embeddings()
    biased = torch.nn.Linear(head.in_features, head.out_features)
    biased.weight = head.weight
    torch.nn.init.normal_(biased.bias)
    granite.set_output_embeddings(biased)
    # Under LoRA, because TRL would load the reference from the folder, where there is no bias.
    built, inputs = moved_on(granite, tmp_path, "exact@loss", lora=True, tokenizer=tokenizer_of(model))
    check_gradient(built, inputs, "exact@loss")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_reference_is_the_model_without_its_adapter(checkpointing, model, tmp_path):
    built, inputs = moved_on(model, tmp_path, "exact@loss", lora=True, gradient_checkpointing=checkpointing)
    check_gradient(built, inputs, "exact@loss")


def test_policy_trains_towards_the_reference(model, tmp_path):
    built = trainers.build(
        GRPOTrainer,
        GRPOConfig,
        model,
        tmp_path,
        reward=trainers.zero_reward,
        kl="exact@loss",
        max_steps=16,
        beta=1.0,
        learning_rate=3e-3,
    )
    trainers.shift(built, 0.05)
    built.train()
    values = trainers.log_of(built, "kl/exact")
    assert sum(values[-4:]) < 0.5 * sum(values[:4])


def test_start_says_what_exact_terms_cost(model, tmp_path, capfd):
    trainers.build(GRPOTrainer, GRPOConfig, model, tmp_path, kl="exact@loss").train()
    assert "costs a forward pass of the reference and both heads once more" in capfd.readouterr().err
    trainers.build(GRPOTrainer, GRPOConfig, model, tmp_path, kl="k2@loss").train()
    assert "costs" not in capfd.readouterr().err


@pytest.mark.parametrize("spec", ["exact@advantage", "k3@advantage/future:exact/gamma:0.9/allow:biased"])
@pytest.mark.parametrize(("trainer", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_future_of_an_advantage_is_exact(spec, trainer, config, lora, model, tmp_path):
    built = trainers.build(trainer, config, model, tmp_path, kl=spec, temperature=TEMPERATURE, lora=lora)
    trainers.shift(built, 0.05)
    inputs, _, _ = trainers.rollout_and_gradient(built)
    with torch.no_grad():
        kl, logp, *_ = by_hand(built, inputs)
    mask = inputs["completion_mask"].bool()
    expected = kl_penalty(KLSpec.parse(spec), logp.float(), inputs["ref_per_token_logps"], mask, exact=kl.float())
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(inputs["kl_plugins_penalty"], expected, rtol=1e-3, atol=1e-4)


def test_a_head_that_gives_other_log_probs_is_refused(model, tmp_path, monkeypatch):
    built, inputs = moved_on(model, tmp_path, "exact@loss")
    honest = adapter.head_of
    monkeypatch.setattr("kl_plugins.patches.trl.exact.head_of", lambda m: honest(m)._replace(scale=1.5))
    with pytest.raises(RuntimeError, match="differ from TRL's own by"):
        built.compute_loss(built.model, inputs)


def test_a_head_that_is_not_linear_is_refused(model, tmp_path):
    built, inputs = moved_on(model, tmp_path, "exact@loss")

    class Doubled(torch.nn.Module):
        def __init__(self, inner: torch.nn.Linear) -> None:
            super().__init__()
            self.weight, self.bias = inner.weight, inner.bias

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return 2 * torch.nn.functional.linear(hidden, self.weight)

    built.model.set_output_embeddings(Doubled(built.model.get_output_embeddings()))
    with pytest.raises(TypeError, match="is a Doubled"):
        built.compute_loss(built.model, inputs)
