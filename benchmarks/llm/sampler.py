"""A sampler that is some updates behind the policy, as an asynchronous engine is, in the precision of one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.study.sampler import Drawn

from .decode import drawer
from .model import load


class LaggedSampler:
    """TRL's `rollout_func`: completions of the policy as it was some updates ago, with their true log-probs.

    Args:
        folder: of the model that the policy began as.
        device: `cpu` or `cuda`.
        delay: updates that it is behind; fewer while so many have not been made.
        tokenizer: pads on the left.
        shape: rows, tokens of the longest prompt, most tokens of a completion.
        seed: of the tokens drawn.
        watch: called with the policy, the completions, and the updates made.
    """

    def __init__(
        self, folder: Any, device: str, delay: int, tokenizer: Any, shape: tuple[int, int, int], seed: int,
        watch: Callable[[Any, Drawn, int], None] = lambda policy, drawn, step: None,
    ) -> None:  # fmt: skip
        self.model = load(folder, device, "bfloat16" if device == "cuda" else "float32")
        self._drawer = drawer(self.model, tokenizer, *shape)
        self._generator = torch.Generator(device).manual_seed(seed)
        self._snapshots: deque[list[Tensor]] = deque(maxlen=delay + 1)
        self._tokenizer, self._watch = tokenizer, watch
        self.seconds: list[float] = []

    @property
    def captured(self) -> str:
        """Whether tokens come from a captured graph."""
        return self._drawer.captured

    @torch.no_grad()
    def follow(self, policy: Any) -> None:
        """Take a snapshot of the policy, and become the oldest one kept. Called once before each update."""
        own = list(self.model.parameters())  # those that two layers share are listed once
        self._snapshots.append(
            [p.detach().to(o.dtype, copy=True) for p, o in zip(policy.parameters(), own, strict=True)]
        )
        torch._foreach_copy_(own, self._snapshots[0])

    def draw(self, policy: Any, prompts: list[str]) -> Drawn:
        """Follow the policy, then complete the prompts."""
        self.follow(policy)
        return self._drawer.draw(prompts, self._generator)

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """What TRL wants of a rollout."""
        start = time.perf_counter()
        policy = trainer.accelerator.unwrap_model(trainer.model)
        drawn = self.draw(policy, prompts)
        made = {
            "prompt_ids": [self._tokenizer(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": drawn.completion_lists(),
            "logprobs": drawn.log_prob_lists(),
        }
        self.seconds.append(time.perf_counter() - start)
        self._watch(policy, drawn, trainer.state.global_step)
        return made
