"""Measurements of a policy on prompts that it was not trained on, and of the importance weights of stale data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.study.sampler import Drawn
from kl_plugins import exact_kl

from .decode import drawer
from .settings import Settings
from .tasks import Prompts

EVALUATION_SEED = 20_000
CHUNK = 16  # number of rows whose logits are in memory at once
ROWS = 64  # number of completions drawn at once
SHOWN = 4  # number of completions kept as text
FLOORS = (0.5, 1.0)


def states(model: Any, drawn: Drawn) -> tuple[Tensor, Tensor]:
    """Return the (B, T, D) hidden states in which the tokens were drawn, and the head (V, D), without autocast."""
    positions = (drawn.attention.cumsum(1) - 1).clamp(min=0)
    # The backbone is called, because a trainer may have wrapped the forward pass of the model.
    found = model.base_model(input_ids=drawn.sequences, attention_mask=drawn.attention, position_ids=positions)
    hidden: Tensor = found.last_hidden_state[:, drawn.prompt_ids.shape[1] - 1 : -1]
    return hidden, model.get_output_embeddings().weight


def logits(model: Any, drawn: Drawn) -> Iterator[tuple[slice, Tensor]]:
    """Yield (B', T, V) float32 logits for some rows at a time."""
    hidden, head = states(model, drawn)
    for start in range(0, len(hidden), CHUNK):
        rows = slice(start, start + CHUNK)
        yield rows, (hidden[rows] @ head.T).float()


class Measure:
    """Measures policies against one reference on the held-out prompts.

    Args:
        reference: the reference model, in evaluation mode and float32.
        prompts: prompts of the task.
        tokenizer: tokenizer of both models.
        settings: settings of the run.
        prompt_tokens: number of tokens of the longest prompt.
    """

    def __init__(
        self, reference: Any, prompts: Prompts, tokenizer: Any, settings: Settings, prompt_tokens: int
    ) -> None:
        self._reference, self._prompts, self._tokenizer = reference, prompts, tokenizer
        self._shape = prompt_tokens, settings.tokens
        self._repeated = [p for p in prompts.held_out for _ in range(settings.evaluation_samples)]
        self._rows = min(ROWS, len(self._repeated))
        self._drawers: dict[int, Any] = {}

    @torch.no_grad()
    def __call__(self, policy: Any) -> dict[str, Any]:
        """Measure reward, exact KL to the reference, entropy and length, and keep some texts.

        KL and entropy are in nats per completion. They are computed from the whole distribution at every state of the
        sampled completions. The length is in tokens per completion.
        """
        training = policy.training
        policy.eval()
        draw = self._drawers.setdefault(id(policy), drawer(policy, self._tokenizer, self._rows, *self._shape)).draw
        rewards: list[float] = []
        kl, entropy, tokens, texts = 0.0, 0.0, 0.0, []
        for start in range(0, len(self._repeated), self._rows):
            prompts = self._repeated[start : start + self._rows]
            generator = torch.Generator(policy.device).manual_seed(EVALUATION_SEED + start)  # equal for all policies
            drawn = draw(prompts, generator)
            answers = self._tokenizer.batch_decode(drawn.completion_lists(), skip_special_tokens=True)
            rewards += self._prompts.reward(prompts, answers)
            texts += answers
            tokens += float(drawn.mask.sum())
            labels = drawn.sequences[:, drawn.prompt_ids.shape[1] :]
            for (rows, own), (_, ref) in zip(logits(policy, drawn), logits(self._reference, drawn), strict=True):
                mask = drawn.mask[rows]
                # The eager backend is used, because compiling in every worker takes longer than a few evaluations.
                kl += float(exact_kl(own, ref, labels[rows], mask=mask, backend="eager").kl.sum())
                logp = own.log_softmax(-1)
                entropy -= float(((logp.exp() * logp).sum(-1) * mask).sum())
        policy.train(training)
        count = len(self._repeated)
        every = max(count // SHOWN, 1)
        shown = [
            {"question": self._prompts.question_of[p], "answer": a, "reward": r}
            for p, a, r in list(zip(self._repeated, texts, rewards, strict=True))[::every][:SHOWN]
        ]
        return {
            "reward": sum(rewards) / count, "kl": kl / count, "entropy": entropy / count, "tokens": tokens / count,
            "sampled": count, "texts": shown,
        }  # fmt: skip


@torch.no_grad()
def staleness(policy: Any, drawn: Drawn) -> dict[str, float]:
    """Describe the importance weights policy/sampler of the tokens of a rollout.

    Args:
        policy: the policy in training.
        drawn: completions of the sampler.

    Returns:
        `ess`: effective sample size as a share of the tokens; `below_*`: share of weights below that floor;
        `weight_max` and `weight_mean`.
    """
    ids = drawn.sequences[:, drawn.prompt_ids.shape[1] :, None]
    logp = torch.cat([found.log_softmax(-1).gather(-1, ids[rows]).squeeze(-1) for rows, found in logits(policy, drawn)])
    weight = (logp - drawn.logp).exp()[drawn.mask].double()
    ess = weight.sum().square() / weight.square().sum() / weight.numel()
    below = {f"below_{floor:g}": float((weight < floor).double().mean()) for floor in FLOORS}
    return {"ess": float(ess), **below, "weight_max": float(weight.max()), "weight_mean": float(weight.mean())}
