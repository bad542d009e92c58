"""A tokenizer, a two-layer Qwen2 and a verifiable reward, made on the spot: nothing comes from a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

BETA = 0.2
"""The beta of :func:`settings`."""


def build_model(folder: Path, seed: int = 0) -> str:
    """Write a tiny character-level model with its tokenizer; return the folder's name."""
    torch.manual_seed(seed)
    vocabulary = {"<|endoftext|>": 0, "<eos>": 1, "<bos>": 2}
    # Few words, so that a fair share of completions ends early.
    for character in "0123456789+=":
        vocabulary[character] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<eos>",
        bos_token="<bos>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(fast),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            pad_token_id=fast.pad_token_id,
            eos_token_id=fast.eos_token_id,
            bos_token_id=fast.bos_token_id,
        )
    )
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(4.0)  # sharper than the initialisation
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)


def prompts(n: int = 32) -> Dataset:
    """Sums to complete."""
    return Dataset.from_list([{"prompt": f"{i % 7}+{i % 5}="} for i in range(n)])


def even_reward(completions: list[str], **_: Any) -> list[float]:
    """Share of characters with an even code point: every completion earns something, and not the same."""
    return [sum(ord(c) % 2 == 0 for c in text) / max(len(text), 1) for text in completions]


def zero_reward(completions: list[str], **_: Any) -> list[float]:
    """No task signal: what moves the policy is the KL."""
    return [0.0] * len(completions)


def settings(output: Path, **changes: Any) -> dict[str, Any]:
    """Arguments of a GRPO or RLOO config for a few steps on a CPU."""
    return {
        "output_dir": str(output), "max_steps": 2, "per_device_train_batch_size": 8, "num_generations": 4,
        "max_completion_length": 8, "learning_rate": 1e-3, "beta": BETA, "logging_steps": 1, "save_strategy": "no",
        "report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
        "lr_scheduler_type": "constant", "seed": 1, **changes,
    }  # fmt: skip


def build(
    trainer: type,
    config: type,
    model: Any,
    output: Path,
    *,
    reward: Any = even_reward,
    lora: bool = False,
    tokenizer: Any = None,
    **changes: Any,
) -> Any:
    """A trainer on the tiny model."""
    peft_config = None
    if lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return trainer(
        model,
        reward_funcs=reward,
        args=config(**settings(output, **changes)),
        train_dataset=prompts(),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def log_of(trainer: Any, key: str) -> list[float]:
    """One metric over the logged steps."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def shift(trainer: Any, scale: float = 0.05, seed: int = 3) -> None:
    """Move the policy away from its reference, so that there is a KL to see."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def rollout_and_gradient(trainer: Any, rows: int = 8) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """One rollout, one loss and its gradient, without an optimizer: (inputs, gradient, loss)."""
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    torch.manual_seed(5)
    batch = [trainer.train_dataset[i // trainer.num_generations] for i in range(rows)]
    inputs = trainer._generate_and_score_completions(batch)
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return inputs, gradient(trainer), loss.detach()


def gradient(trainer: Any) -> torch.Tensor:
    """All gradients, flattened."""
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def log_ratio(built: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, T) log(policy/reference) by TRL's own functions, 0 outside the response."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    with torch.no_grad():
        logp, ref = (
            built._get_per_token_logps_and_entropies(m, ids, attention, inputs["completion_ids"].shape[1])[0]
            for m in (built.model, built.ref_model)
        )
    return (logp - ref) * inputs["completion_mask"]
