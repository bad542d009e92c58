"""KL of the states of a rollout from the logits that TRL's models give themselves, with plain torch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kl_plugins.adapters.trl import GRPOConfig, GRPOTrainer
from tests.support.trl import trainers

TEMPERATURE = 0.7
"""Temperature of every trainer here. It is not 1, so that a forgotten division is noticed."""


def moved_on(model: Any, folder: Path, spec: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """A trainer and a rollout, after which its policy moved on; no task reward, so that all there is is the KL."""
    settings = {"loss_type": "dapo", "num_iterations": 2, "scale_rewards": "none", "temperature": TEMPERATURE}
    settings |= {"max_completion_length": 14}  # long enough for some completions to end earlier
    built = trainers.build(
        GRPOTrainer, GRPOConfig, model, folder, reward=trainers.zero_reward, kl=spec, **{**settings, **changes}
    )
    trainers.shift(built, 0.05)
    inputs, _, _ = trainers.rollout_and_gradient(built)
    trainers.shift(built, 0.03, seed=9)
    built.model.zero_grad()
    return built, inputs


def capped_model(model: str, folder: Path) -> str:
    """A Gemma2, whose head caps its logits, with the tokenizer of the usual model."""
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 64}
    config = Gemma2Config(
        vocab_size=len(tokenizer), final_logit_softcapping=2.0, max_position_embeddings=128, **sizes, **heads
    )
    capped = Gemma2ForCausalLM(config)
    with torch.no_grad():
        capped.get_input_embeddings().weight.mul_(20.0)  # logits in the cap's bend
    capped.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def log_softmax(model: Any, inputs: dict[str, Any]) -> Tensor:
    """(B, T, V) from the logits that the model itself gives, float64."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    length = inputs["completion_ids"].shape[1]
    images = {name: inputs[name] for name in ("pixel_values",) if name in inputs}
    logits = model(input_ids=ids, attention_mask=attention, **images).logits[:, -length - 1 : -1]
    return torch.log_softmax(logits.double() / TEMPERATURE, dim=-1)


class ByHand(NamedTuple):
    """What an exact term is made of, (B, T) each, 0 outside the response, with the policy's graph.

    Attributes:
        kl: KL over the whole vocabulary, or over a set and one bucket.
        logp: log-probs of the labels under the policy.
        ref_logp: the same under the reference.
        remainder: contribution of the labels that are not in the set, detached; 0 without a set.
    """

    kl: Tensor
    logp: Tensor
    ref_logp: Tensor
    remainder: Tensor


def by_hand(built: Any, inputs: dict[str, Any], top: int | None = None, policy: Tensor | None = None) -> ByHand:
    """The definition, from two full softmaxes; the set holds the reference's most probable tokens.

    Args:
        built: a trainer.
        inputs: its rollout.
        top: size of the set; None: no set.
        policy: (B, T, V) log-probs of the policy, if they are not to come from the model.
    """
    policy = log_softmax(built.model, inputs) if policy is None else policy
    with torch.no_grad(), _as_reference(built):
        reference = log_softmax(built.model if built.ref_model is None else built.ref_model, inputs)
    labels, mask = inputs["completion_ids"].unsqueeze(-1), inputs["completion_mask"].bool()
    logp, ref_logp = (side.gather(-1, labels).squeeze(-1) for side in (policy, reference))
    each = policy.exp() * (policy - reference)
    if top is None:
        kl, remainder = each.sum(-1), torch.zeros_like(logp)
    else:
        chosen = reference.topk(top, -1).indices
        inside = torch.zeros_like(reference, dtype=torch.bool).scatter(-1, chosen, True)
        bucket = [side.exp().masked_fill(inside, 0.0).sum(-1) for side in (policy, reference)]
        log_ratio = bucket[0].log() - bucket[1].log()
        kl = each.masked_fill(~inside, 0.0).sum(-1) + bucket[0] * log_ratio
        outside = ~inside.gather(-1, labels).squeeze(-1)
        remainder = (logp - ref_logp - log_ratio).masked_fill(~outside, 0.0)
    return ByHand(*(part.masked_fill(~mask, 0.0) for part in (kl, logp, ref_logp, remainder.detach())))


def _as_reference(built: Any) -> AbstractContextManager[Any]:
    if built.ref_model is not None:
        return nullcontext()
    from trl.trainer.utils import use_adapter

    model = built.accelerator.unwrap_model(built.model)
    adapter: AbstractContextManager[Any] = use_adapter(model, "ref" if "ref" in model.peft_config else None)
    return adapter
