"""TRL: a GRPO trainer whose generation is replaced by responses that the benchmark gives."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # read when TRL is imported

QUIET: dict[str, Any] = {
    "logging_steps": 1, "save_strategy": "no", "report_to": [], "bf16": False, "gradient_checkpointing": False,
    "disable_tqdm": True,
}  # fmt: skip
"""Arguments of a short run that writes nothing."""


def stay_on_the_cpu() -> None:
    """Keep this process off a GPU; to be called before the first trainer is made."""
    os.environ.setdefault("ACCELERATE_USE_CPU", "1")


def classes(spec: str | None) -> tuple[Any, Any]:
    """``GRPOTrainer`` and ``GRPOConfig``: TRL's own, or those with the field ``kl`` where there is a spec."""
    import trl

    from kl_plugins.adapters import trl as ours

    source: Any = ours if spec else trl
    return source.GRPOTrainer, source.GRPOConfig


class Responses:
    """Stands where TRL's generation stands, and gives the same responses for a prompt again and again.

    Args:
        prompts: (P,) token ids of each sequence's prompt; the sequences of a group lie side by side.
        responses: (T,) token ids.
        log_probs: (T,) the sampler's, in nats; None: it gives none.
        group: responses per prompt.
    """

    def __init__(
        self, prompts: Sequence[Tensor], responses: Sequence[Tensor], log_probs: Sequence[Tensor] | None, group: int
    ) -> None:
        self._prompts, self._responses, self._log_probs, self._group = prompts, responses, log_probs, group

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """TRL's ``rollout_func``; a prompt is the index of its group, as text."""
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
        """The prompts: one per group."""
        from datasets import Dataset

        return Dataset.from_list([{"prompt": str(i)} for i in range(len(self._prompts) // self._group)])

    def install(self, trainer: Any) -> None:
        """Take the place of the trainer's own generation, under a spec that refuses a rollout function."""
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
    """A trainer of TRL's, fed with fixed responses.

    Args:
        model: folder of the policy that training starts from; it is the reference as well.
        spec: the KL spec; empty or None: TRL's own KL.
        responses: what it trains on.
        reward: TRL's reward function.
        in_reward: whether the KL is part of the reward, where kl-plugins refuses a rollout function.
        settings: of TRL's config, over :data:`QUIET`.
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
