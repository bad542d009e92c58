"""The conversion of tasks to a model's own tokens."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.demo import model

from .settings import Settings
from .tasks import Task


def tokenizer_of(settings: Settings) -> Any:
    """Return the word-level tokenizer of the models made here, or the tokenizer of a given model."""
    if not settings.model:
        return model.tokenizer()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings.model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def completion_tokens(task: Task, settings: Settings, tokenizer: Any) -> int:
    """Return the number of tokens of the task's longest completion, including its end."""
    if not settings.model:
        return task.completion_tokens
    return 1 + max(
        len(tokenizer(_text(line.completion), add_special_tokens=False)["input_ids"]) for line in task.lines()
    )


def encoded(task: Task, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor], int]:
    """Return the task's lines for `model.fit`.

    Returns:
        Ids (lines, tokens), padded at the end; the mask; the probabilities in the two phases; the index of the first
        token to learn. All prompts of a task have one length in every tokenizer that splits digits.

    Raises:
        ValueError: if the prompts have different lengths in this tokenizer.
    """
    lines = task.lines()
    prompts = [tokenizer(line.prompt)["input_ids"] for line in lines]
    if len({len(prompt) for prompt in prompts}) != 1:
        raise ValueError(f"this model's tokenizer gives the prompts of {task.name!r} different lengths; use another")
    rows = [
        prompt + tokenizer(_text(line.completion), add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        for prompt, line in zip(prompts, lines, strict=True)
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
    phases = (torch.tensor([line.early for line in lines]), torch.tensor([line.late for line in lines]))
    return ids, mask, phases, len(prompts[0])


def _text(completion: str) -> str:
    """Return a completion as it follows its prompt. The blank separates words in every tokenizer."""
    return f" {completion}"
