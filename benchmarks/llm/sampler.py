"""A sampler that is some updates behind the policy and computes in the precision of an engine, as in async training."""

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
    """A `rollout_func` for TRL that draws from the policy of some updates ago and returns the true log-probs.

    Args:
        folder: folder of the model from which the policy started.
        device: `cpu` or `cuda`.
        delay: number of updates that the sampler is behind; at the start of a run it is smaller.
        tokenizer: tokenizer that pads on the left.
        shape: number of rows, tokens of the longest prompt, and largest number of tokens of a completion.
        seed: seed of the drawn tokens.
        watch: function that is called with the policy, the completions, and the number of updates so far.
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
        """`yes` if tokens are replayed from a captured graph, otherwise the reason why not."""
        return self._drawer.captured

    @torch.no_grad()
    def follow(self, policy: Any) -> None:
        """Store a snapshot of the policy, and load the oldest stored one; this is called once before each update."""
        own = list(self.model.parameters())  # parameters that two layers share are listed once
        self._snapshots.append(
            [p.detach().to(o.dtype, copy=True) for p, o in zip(policy.parameters(), own, strict=True)]
        )
        torch._foreach_copy_(own, self._snapshots[0])

    def draw(self, policy: Any, prompts: list[str]) -> Drawn:
        """Follow the policy, then complete the prompts."""
        self.follow(policy)
        return self._drawer.draw(prompts, self._generator)

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """Return completions in the form that TRL expects from a `rollout_func`."""
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
