"""A sampler that differs from the policy, like an asynchronous engine: some updates older, or in another precision."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Drawn:
    """Sampled completions.

    Attributes:
        prompt_ids: (B, P) int64, padded on the left.
        sequences: (B, P + T) int64 prompts and completions.
        attention: (B, P + T) 1 on prompts and on completions up to their end, else 0.
        mask: (B, T) bool, True on completions up to their end.
        logp: (B, T) log-probs of the tokens under the distribution that they were drawn from, nats, float32.
    """

    prompt_ids: Tensor
    sequences: Tensor
    attention: Tensor
    mask: Tensor
    logp: Tensor

    def completion_lists(self) -> list[list[int]]:
        """Return the completions' token ids, without padding."""
        start = self.prompt_ids.shape[1]
        return [row[start:][kept].tolist() for row, kept in zip(self.sequences, self.mask, strict=True)]

    def log_prob_lists(self) -> list[list[float]]:
        """Return the completions' log-probs, without padding, nats."""
        return [row[kept].tolist() for row, kept in zip(self.logp, self.mask, strict=True)]


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompts: list[str], tokens: int, generator: torch.Generator) -> Drawn:
    """Draw one completion per prompt at temperature 1 from the whole vocabulary.

    Args:
        model: any causal language model, in evaluation mode.
        tokenizer: a tokenizer that pads on the left.
        prompts: texts of the prompts.
        tokens: largest number of tokens of a completion.
        generator: random generator on the model's device.
    """
    batch = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
    prompt_ids, attention = batch["input_ids"], batch["attention_mask"]
    alive = torch.ones(len(prompts), dtype=torch.bool, device=model.device)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    ids, cache = prompt_ids, None
    written, masks, log_probs = [], [], []
    for _ in range(tokens):
        out = model(
            input_ids=ids, attention_mask=attention, position_ids=positions, past_key_values=cache, use_cache=True
        )
        logp = out.logits[:, -1].float().log_softmax(-1)
        drawn = torch.multinomial(logp.exp(), 1, generator=generator)
        log_probs.append(logp.gather(1, drawn))
        masks.append(alive[:, None])
        ids = drawn.masked_fill(~alive[:, None], tokenizer.pad_token_id)
        written.append(ids)
        attention = torch.cat([attention, alive[:, None].to(attention)], 1)
        positions, cache = positions[:, -1:] + 1, out.past_key_values
        alive = alive & (drawn[:, 0] != tokenizer.eos_token_id)
        if not alive.any():
            break
    mask = torch.cat(masks, 1)
    return Drawn(prompt_ids, torch.cat([prompt_ids, *written], 1), attention, mask, torch.cat(log_probs, 1) * mask)


def completion_logits(model: Any, drawn: Drawn) -> Tensor:
    """Return float32 logits (B, T, V) of the states in which the completions' tokens were drawn."""
    positions = (drawn.attention.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=drawn.sequences, attention_mask=drawn.attention, position_ids=positions)
    logits: Tensor = out.logits[:, drawn.prompt_ids.shape[1] - 1 : -1].float()
    return logits


@torch.no_grad()
def completion_log_probs(model: Any, drawn: Drawn) -> Tensor:
    """Return log-probs (B, T) of the completions' tokens under a model, nats, float32; 0 after a completion's end."""
    ids = drawn.sequences[:, drawn.prompt_ids.shape[1] :, None]
    return completion_logits(model, drawn).log_softmax(-1).gather(-1, ids).squeeze(-1) * drawn.mask


class LaggedSampler:
    """A sampler that draws completions from the policy of some updates ago, with their true log-probs.

    Args:
        delay: number of updates that the sampler is behind; fewer as long as there were fewer updates.
        precision: `fp32` or `bf16`, the precision of its weights and forward passes.
        tokens: largest number of tokens of a completion.
        seed: seed of the drawn tokens.
    """

    def __init__(self, delay: int, precision: str, tokens: int, seed: int) -> None:
        self._snapshots: deque[dict[str, Tensor]] = deque(maxlen=delay + 1)
        self._dtype, self._tokens, self._seed = DTYPES[precision], tokens, seed
        self._generator: torch.Generator | None = None
        self.model: Any = None

    def follow(self, policy: Any) -> None:
        """Take a snapshot of the policy, and use the oldest snapshot. Call this once before each update."""
        self._snapshots.append({name: value.detach().clone() for name, value in policy.state_dict().items()})
        if self.model is None:
            # A deep copy would not work: TRL replaces the policy's `forward`, and the replacement calls the original.
            self.model = type(policy)(policy.config).to(policy.device).eval()
            for parameter in self.model.parameters():  # Buffers keep their precision, as rotary tables do in engines.
                parameter.data = parameter.data.to(self._dtype)
            self._generator = torch.Generator(policy.device).manual_seed(self._seed)
        self.model.load_state_dict(self._snapshots[0])

    def draw(self, policy: Any, tokenizer: Any, prompts: list[str]) -> Drawn:
        """Call :meth:`follow`, then complete the prompts."""
        self.follow(policy)
        assert self._generator is not None
        return sample(self.model, tokenizer, prompts, self._tokens, self._generator)

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """Act as TRL's `rollout_func`."""
        tokenizer = trainer.processing_class
        drawn = self.draw(trainer.accelerator.unwrap_model(trainer.model), tokenizer, prompts)
        return {
            "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": drawn.completion_lists(),
            "logprobs": drawn.log_prob_lists(),
        }
