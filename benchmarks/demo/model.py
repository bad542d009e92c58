"""The reference model: a two-layer Qwen2, made from its configuration and trained on the task's lines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import task

BATCH = 96
RATE = 6e-3
LEARNING = 0.7  # of the steps: products are frequent, so that they are learned; then they become rare
HIDDEN = 32


def tokenizer() -> Any:
    """A word-level tokenizer over the task's vocabulary, made in code."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(task.VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def blank_model(seed: int) -> Any:
    """An untrained two-layer Qwen2 without dropout."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(task.VOCABULARY), hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32, attention_dropout=0.0,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def corpus(products: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Every correct line and its probability.

    Args:
        products: the share of lines with a product.

    Returns:
        Token ids (lines, 9), int64, and probabilities (lines,), float32, which sum to one.
    """
    ids: list[list[int]] = []
    probabilities: list[float] = []
    for number in task.NUMBERS:
        for expressions, share in zip(task.lines(number), (1 - products, products), strict=True):
            for expression in expressions:
                ids.append(task.ids(f"{task.prompt(number)} {expression} <eos>"))
                probabilities.append(share / len(expressions) / len(task.NUMBERS))
    return torch.tensor(ids), torch.tensor(probabilities)


def pretrain(folder: Path, steps: int, seed: int, tick: Callable[[int], None]) -> float:
    """Train the reference on random lines and save it with its tokenizer.

    Args:
        folder: where the model and the tokenizer are written.
        steps: optimizer steps.
        seed: of the initial weights and of the lines drawn.
        tick: called with the number of steps done.

    Returns:
        The last loss, nats per completion token.
    """
    model = blank_model(seed)
    ids, early = corpus(task.LEARNED)
    _, late = corpus(task.RARE)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    start = ids.shape[1] - task.COMPLETION_TOKENS
    loss = torch.zeros(())
    for step in range(steps):
        probabilities = early if step < steps * LEARNING else late
        batch = ids[torch.multinomial(probabilities, BATCH, replacement=True, generator=generator)]
        logits = model(input_ids=batch).logits[:, start - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, start:].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        tick(step + 1)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return loss.item()
