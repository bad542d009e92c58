"""The reference model: a Qwen2 with two layers, made from its configuration and trained on the lines of the task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import task

BATCH = 96
RATE = 6e-3
LEARNING = 0.7  # share of the steps in which products are frequent, so that they are learned; later they are rare
HIDDEN = 32
IGNORED = -100  # label of positions that have no loss


def tokenizer() -> Any:
    """Make a word-level tokenizer for the vocabulary of the task."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(task.VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def blank_model(seed: int, family: str = "qwen2", hidden: int = HIDDEN, layers: int = 2) -> Any:
    """Make an untrained model without dropout from its configuration.

    Args:
        seed: seed of the weights.
        family: a model type of transformers, such as `qwen2` or `llama`.
        hidden: width of the model; the feed-forward layer is twice as wide.
        layers: number of layers.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family, vocab_size=len(task.VOCABULARY), hidden_size=hidden, intermediate_size=2 * hidden,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32,
        attention_dropout=0.0, pad_token_id=0, eos_token_id=1, bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def corpus(products: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return every correct line with its probability.

    Args:
        products: share of the lines with a product.

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
        folder: folder for the model and the tokenizer.
        steps: number of optimizer steps.
        seed: seed of the initial weights and of the drawn lines.
        tick: function that is called with the number of finished steps.

    Returns:
        The last loss, nats per completion token.
    """
    model = blank_model(seed)
    ids, early = corpus(task.LEARNED)
    _, late = corpus(task.RARE)
    loss = fit(model, ids, (early, late), ids.shape[1] - task.COMPLETION_TOKENS, steps, seed, tick)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return loss


def fit(
    model: Any, ids: torch.Tensor, phases: tuple[torch.Tensor, torch.Tensor], start: int, steps: int, seed: int,
    tick: Callable[[int], None], rate: float = RATE, mask: torch.Tensor | None = None,
) -> float:  # fmt: skip
    """Train a model on random lines, in two phases with different probabilities of the lines.

    Args:
        model: any causal language model.
        ids: (lines, tokens) int64.
        phases: (lines,) probabilities of the lines in each phase.
        start: index of the first token that is learned.
        steps: number of optimizer steps.
        seed: seed of the drawn lines.
        tick: function that is called with the number of finished steps.
        rate: the highest learning rate.
        mask: (lines, tokens) bool, False on padding at the end of a line; by default there is no padding.

    Returns:
        The last loss, nats per learned token.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    labels = ids if mask is None else ids.masked_fill(~mask, IGNORED)
    loss = torch.zeros(())
    for step in range(steps):
        rows = torch.multinomial(phases[step >= steps * LEARNING], BATCH, replacement=True, generator=generator)
        logits = model(input_ids=ids[rows].to(model.device)).logits[:, start - 1 : -1]
        wanted = labels[rows, start:].to(model.device)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        tick(step + 1)
    return loss.item()
