"""Fixed rollouts in place of vLLM's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PROMPTS = (3, 3, 5, 5, 2, 2, 4, 4)
RESPONSES = (6, 4, 7, 5, 3, 8, 4, 6)


@dataclass(frozen=True)
class Rollouts:
    """What vLLM and the reward function would have given, one entry per sequence.

    Attributes:
        tokens: token ids of prompt and response, ``(length,)``.
        masks: 1 on the response's tokens, else 0, ``(length - 1,)``: shifted as the host's action masks are.
        rewards: of each sequence.
        log_probs: the sampler's, ``(length - 1,)``, 0 outside the response; None: not asked for.
    """

    tokens: list[Tensor]
    masks: list[Tensor]
    rewards: list[float]
    log_probs: list[Tensor] | None = None

    @classmethod
    def of(
        cls, prompts: Sequence[Tensor], responses: Sequence[Tensor], log_probs: Sequence[Tensor], rewards: list[float]
    ) -> Rollouts:
        """From token ids of prompts and responses, and the sampler's log-probs of the responses' tokens."""
        tokens = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
        masks = [(torch.arange(1, len(row)) >= len(p)).long() for row, p in zip(tokens, prompts, strict=True)]
        found = [torch.cat([torch.zeros(len(p) - 1), row]) for p, row in zip(prompts, log_probs, strict=True)]
        return cls(tokens, masks, rewards, found)

    def without_log_probs(self) -> Rollouts:
        """Return these rollouts as they are if no log-probs were asked for."""
        return replace(self, log_probs=None)

    def with_log_prob(self, sequence: int, token: int, value: float) -> Rollouts:
        """Return these rollouts with another log-prob of one response token; a missing one arrives from vLLM as 0."""
        log_probs = [values.clone() for values in self.log_probs or ()]
        log_probs[sequence][int(self.masks[sequence].nonzero()[token])] = value
        return replace(self, log_probs=log_probs)

    def with_empty_mask(self, *sequences: int) -> Rollouts:
        """Return these rollouts with responses that hold no token of the policy."""
        masks = [mask * (index not in sequences) for index, mask in enumerate(self.masks)]
        return replace(self, masks=masks)

    def experiences(self) -> list[Any]:
        """The host's own form, as its ``SamplesGenerator`` makes it: new objects, the host changes them."""
        from openrlhf.trainer.ppo_utils.experience import Experience

        found = []
        for index, (tokens, mask, reward) in enumerate(zip(self.tokens, self.masks, self.rewards, strict=True)):
            rewards = torch.tensor([reward])
            found.append(
                Experience(
                    sequences=tokens[None].clone(),
                    attention_mask=torch.ones_like(tokens)[None],
                    action_mask=mask[None].clone(),
                    rollout_log_probs=self.log_probs[index][None].clone() if self.log_probs else None,
                    prompts=["prompt"],
                    labels=["label"],
                    images=[None],
                    mm_train_inputs=[None],
                    rewards=rewards,
                    scores=rewards.clone(),
                    response_length=mask.sum()[None],
                    truncated=torch.tensor([False]),
                    total_length=torch.tensor([float(len(tokens))]),
                    info={"reward": rewards.clone()},
                )
            )
        return found


def make_rollouts(path: str | Path, *, noise: float = 0.1) -> Rollouts:
    """Fixed rollouts; the sampler's log-probs lie `noise` (nats) around those of the model at `path`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    random = torch.Generator().manual_seed(7)
    tokens, masks, log_probs = [], [], []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ids = torch.randint(2, model.config.vocab_size, (prompt + response,), generator=random)
        mask = (torch.arange(1, len(ids)) >= prompt).long()
        with torch.no_grad():
            logp = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        tokens.append(ids)
        masks.append(mask)
        log_probs.append((logp + noise * torch.randn(logp.shape, generator=random)) * mask)
    return Rollouts(tokens, masks, torch.rand(len(PROMPTS), generator=random).tolist(), log_probs)
