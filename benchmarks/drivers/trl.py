"""TRL: a GRPO trainer that uses responses from the benchmark instead of its own generation."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # TRL reads it at import.

QUIET: dict[str, Any] = {
    "logging_steps": 1, "save_strategy": "no", "report_to": [], "bf16": False, "gradient_checkpointing": False,
    "disable_tqdm": True,
}  # fmt: skip
"""Arguments of a short run that writes nothing."""


def stay_on_the_cpu() -> None:
    """Prevent the use of a GPU in this process. Call it before the first trainer is made."""
    os.environ.setdefault("ACCELERATE_USE_CPU", "1")


def classes(spec: str | None) -> tuple[Any, Any]:
    """Return ``GRPOTrainer`` and ``GRPOConfig``: TRL's own without a spec, else those with the field ``kl``."""
    import trl

    from kl_plugins.adapters import trl as ours

    source: Any = ours if spec else trl
    return source.GRPOTrainer, source.GRPOConfig


class Responses:
    """A replacement for TRL's generation, which gives the same responses for a prompt each time.

    Args:
        prompts: (P,) token ids of each sequence's prompt; the sequences of a group are adjacent.
        responses: (T,) token ids of each response.
        log_probs: (T,) the sampler's log-probs of each response, nats; None if the sampler gives no log-probs.
        group: number of responses per prompt.
    """

    def __init__(
        self, prompts: Sequence[Tensor], responses: Sequence[Tensor], log_probs: Sequence[Tensor] | None, group: int
    ) -> None:
        self._prompts, self._responses, self._log_probs, self._group = prompts, responses, log_probs, group

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Act as TRL's ``rollout_func``. A prompt is the index of its group, as text."""
        seen: Counter[int] = Counter()
        indices = []
        for prompt in prompts:
            group = int(prompt)
            indices.append(group * self._group + seen[group] % self._group)
            seen[group] += 1
        given = self._log_probs
        return {
            "prompt_ids": [self._prompts[i].tolist() for i in indices],
            "completion_ids": [self._responses[i].tolist() for i in indices],
            "logprobs": None if given is None else [given[i].tolist() for i in indices],
        }

    def dataset(self) -> Any:
        """Return the data set of prompts, one per group."""
        from datasets import Dataset

        return Dataset.from_list([{"prompt": str(i)} for i in range(len(self._prompts) // self._group)])

    def install(self, trainer: Any) -> None:
        """Replace the trainer's own generation, for a spec with which a rollout function is rejected."""
        made: dict[str, Any] = {}

        def tokenize(prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
            made.update(self(prompts, trainer))
            return made["prompt_ids"], None, {}

        trainer._tokenize_prompts = tokenize
        trainer._generate_single_turn = lambda *_, **__: (made["completion_ids"], None)


def make_trainer(
    model: Path, spec: str | None, responses: Responses, reward: Callable[..., list[float]], *, in_reward: bool = False,
    **settings: Any,
) -> Any:  # fmt: skip
    """Make one of TRL's trainers with fixed responses.

    Args:
        model: folder of the policy that training starts from, which is also the reference.
        spec: the KL spec; empty or None for TRL's own KL.
        responses: the responses to train on.
        reward: reward function of TRL.
        in_reward: whether the KL is part of the reward, in which case kl-plugins rejects a rollout function.
        settings: settings of TRL's config, which override :data:`QUIET`.
    """
    trainer_class, config_class = classes(spec)
    trainer = trainer_class(
        str(model),
        reward_funcs=reward,
        args=config_class(**{**QUIET, **settings, **({"kl": spec} if spec else {})}),
        train_dataset=responses.dataset(),
        rollout_func=None if in_reward else responses,
    )
    if in_reward:
        responses.install(trainer)
    return trainer
