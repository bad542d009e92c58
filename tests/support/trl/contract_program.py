"""A whole training program whose sampler reports a NaN after the first update: ``program MODEL FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from tests.contract.checks import BY_SAMPLER
from tests.support.trl import trainers


def failing_engine() -> Any:
    """A rollout function whose first batch is sound; after that, one log-prob is NaN."""
    calls = 0

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        tokenizer = trainer.processing_class
        generator = torch.Generator().manual_seed(calls)
        ids = [
            torch.randint(3, len(tokenizer), (3 + i % 4,), generator=generator).tolist() for i in range(len(prompts))
        ]
        log_probs = [[-2.5] * len(completion) for completion in ids]
        if calls > 1:
            log_probs[0][1] = float("nan")
        return {
            "prompt_ids": [tokenizer(p)["input_ids"] for p in prompts],
            "completion_ids": ids,
            "logprobs": log_probs,
        }

    return rollout


if __name__ == "__main__":
    from kl_plugins.adapters.trl import GRPOConfig, GRPOTrainer

    model, folder = sys.argv[1], Path(sys.argv[2])
    settings = trainers.settings(folder, kl=BY_SAMPLER, max_steps=3, save_strategy="steps", save_steps=1)
    GRPOTrainer(
        model, trainers.even_reward, args=GRPOConfig(**settings), train_dataset=trainers.prompts(),
        rollout_func=failing_engine(),
    ).train()  # fmt: skip
