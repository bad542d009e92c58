"""The measures of a policy: by enumeration, or from its own samples if the vocabulary is too large to enumerate."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.demo import evaluate
from kl_plugins import exact_kl

from .sampler import completion_logits, sample
from .settings import Settings
from .tasks import Task
from .text import completion_tokens

LOGGED = (
    "grad_norm", "kl/ess", "kl/weight/mean", "kl/weight/max", "kl/floor_frac", "kl/coef/std", "clip_ratio/region_mean",
)  # fmt: skip
"""The entries of a trainer's log that a run's curve holds, by TRL's names."""


class Measure:
    """Measures policies against one reference.

    Args:
        reference: the reference model, in evaluation mode.
        task: the task.
        settings: settings of the study.
        tokenizer: tokenizer of both models.
    """

    def __init__(self, reference: Any, task: Task, settings: Settings, tokenizer: Any) -> None:
        self._reference, self._task, self._settings, self._tokenizer = reference, task, settings, tokenizer

    def __call__(self, policy: Any) -> dict[str, Any]:
        """Measure reward (rewarded share of completions), KL to the reference, entropy (nats per completion), coverage.

        Enumerated values have no sampling noise. Sampled values come with the number of completions, `sampled`; their
        KL and entropy are computed from whole distributions at sampled prefixes.
        """
        if not self._settings.model:
            found = evaluate.evaluate(policy, self._reference, None, False, self._task.space())
            return {name: found[name] for name in ("reward", "kl", "entropy", "coverage")}
        training = policy.training
        policy.eval()
        found = self._from_samples(policy)
        policy.train(training)
        return found

    @torch.no_grad()
    def _from_samples(self, policy: Any) -> dict[str, Any]:
        repeated = [p for p in self._task.prompts for _ in range(self._settings.evaluation_samples)]
        length = completion_tokens(self._task, self._settings, self._tokenizer)
        rewards, kl, entropy = 0.0, 0.0, 0.0
        for start in range(0, len(repeated), 512):
            prompts = repeated[start : start + 512]
            generator = torch.Generator(policy.device).manual_seed(start)  # the same noise for every policy
            drawn = sample(policy, self._tokenizer, prompts, length, generator)
            texts = self._tokenizer.batch_decode(drawn.completion_lists(), skip_special_tokens=True)
            rewards += sum(self._task.reward(prompts, texts))
            first = drawn.prompt_ids.shape[1]
            logits, ref = (completion_logits(model, drawn) for model in (policy, self._reference))
            kl += float((exact_kl(logits, ref, drawn.sequences[:, first:]).kl * drawn.mask).sum())
            logp = logits.log_softmax(-1)
            entropy -= float(((logp.exp() * logp).sum(-1) * drawn.mask).sum())
        count = len(repeated)
        return {"reward": rewards / count, "kl": kl / count, "entropy": entropy / count, "sampled": count}
