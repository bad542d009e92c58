"""The conversion of sampled completions to the batch that veRL's trainer sends to workers, with veRL's functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.drivers.verl import advantages_of, batch_of
from kl_plugins import KLSpec
from tests.support.verl.workers import Batch

from .sampler import Drawn, completion_log_probs
from .settings import Cell, Settings

UNCLIPPED = 1e9
LOSSES = {"dr_grpo": "seq-mean-token-sum-norm"}
"""veRL's names for TRL's losses."""


def actor_of(settings: Settings, length: int) -> dict[str, Any]:
    """Return the settings of veRL's actor. They are those of the study's TRL runs, with TRL's clip ratio.

    Raises:
        ValueError: if veRL's name for the loss is not known.
    """
    if settings.loss_type not in LOSSES:
        raise ValueError(f"the study knows no loss {settings.loss_type} in veRL; there is {', '.join(LOSSES)}")
    return {
        "loss_agg_mode": LOSSES[settings.loss_type],
        "loss_scale_factor": length,
        "clip_ratio_c": UNCLIPPED,  # TRL has no second clip.
        "kl_loss_coef": settings.beta,
    }


def config_of(cell: Cell, spec: KLSpec | None, settings: Settings, length: int) -> Any:
    """Return veRL's config of the run, after the check that kl-plugins makes of every trainer's config.

    With a ratio that divides by the sampler, veRL is in its bypass mode. If the sampler is the policy, its log-probs
    are the trainer's own, and this mode is off. The mode is also off for `@advantage`: as in TRL, the study computes
    the penalty from the policy's own log-probs, before they are replaced by the sampler's.

    Raises:
        ValueError: if kl-plugins rejects the spec.
    """
    import verl
    from hydra import compose, initialize_config_dir

    from kl_plugins.adapters.verl import ADAPTER

    placement = spec.placement if spec else None
    lags = (cell.delay, cell.precision) != (0, "fp32")
    chosen: dict[str, Any] = {f"actor_rollout_ref.actor.{k}": v for k, v in actor_of(settings, length).items()}
    chosen |= {
        "actor_rollout_ref.rollout.calculate_log_probs": True,
        "algorithm.adv_estimator": "grpo",
        "algorithm.norm_adv_by_std_in_grpo": settings.scale_rewards != "none",
        "algorithm.kl_ctrl.kl_coef": settings.beta,
        "algorithm.rollout_correction.bypass_mode": lags and placement != "advantage",
    }
    if placement == "loss":
        chosen |= {"actor_rollout_ref.actor.use_kl_loss": True, "actor_rollout_ref.actor.kl_loss_type": spec}
    elif spec:
        chosen |= {"algorithm.use_kl_in_reward": True, "algorithm.kl_penalty": spec}
    folder = str(Path(verl.__file__).parent / "trainer" / "config")
    with initialize_config_dir(folder, version_base=None):
        config = compose("ppo_trainer", overrides=[f"{key}={value}" for key, value in chosen.items()])
    try:
        ADAPTER.checked(config)
    except ValueError as error:
        sampler = "a delayed or bf16 sampler" if lags else "the study's settings"
        raise ValueError(f"{cell.arm} cannot be trained with {sampler} in veRL: {error}") from error
    return config


class Trainer:
    """The work of veRL's trainer between rollout and update.

    Args:
        spec: spec of the run, or None.
        config: veRL's config.
        reference: the reference model, in evaluation mode.
        generations: number of completions of one prompt, which are adjacent.
    """

    def __init__(self, spec: KLSpec | None, config: Any, reference: Any, generations: int) -> None:
        from verl.trainer.ppo import core_algos

        from kl_plugins.adapters.verl.score import ScoreController

        self._spec, self._config, self._reference, self._generations = spec, config, reference, generations
        self._score: Any = None
        if spec and spec.placement != "loss":
            self._score = ScoreController(spec, core_algos.get_kl_controller(config.algorithm.kl_ctrl))

    def prepare(self, policy: Any, drawn: Drawn, rewards: list[float]) -> tuple[Batch, dict[str, float]]:
        """Return the batch of an update, and the metrics of a KL in rewards or advantages.

        Args:
            policy: the current policy, in evaluation mode.
            drawn: completions of its sampler.
            rewards: rewards, one per completion.
        """
        named = {"rollout_log_probs": drawn.logp}
        if self._spec:
            named["ref_log_prob"] = completion_log_probs(self._reference, drawn)
        advantages, metrics = self._advantages(policy, drawn, rewards, named)
        named["old_log_probs"] = drawn.logp  # The policy ratio divides by the sampler's probabilities.
        start = drawn.prompt_ids.shape[1]

        def rows(values: Tensor) -> list[Tensor]:
            return [row[kept] for row, kept in zip(values, drawn.mask, strict=True)]

        prompts = [row[kept.bool()] for row, kept in zip(drawn.prompt_ids, drawn.attention[:, :start], strict=True)]
        responses = rows(drawn.sequences[:, start:])
        log_probs = {key: rows(values) for key, values in named.items()}
        return batch_of(prompts, responses, log_probs, rows(advantages)), metrics

    def _advantages(
        self, policy: Any, drawn: Drawn, rewards: list[float], named: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        scores = torch.zeros(drawn.mask.shape)
        scores[torch.arange(len(rewards)), drawn.mask.sum(1) - 1] = torch.tensor(rewards)
        tensors = {"response_mask": drawn.mask.long(), "token_level_scores": scores, **named}
        kl = None
        if self._score is not None:
            kl, tensors["old_log_probs"] = str(self._spec), completion_log_probs(policy, drawn)
        algorithm = self._config.algorithm
        advantages, metrics = advantages_of(tensors, self._generations, algorithm, kl, self._score)
        if self._score is not None and (self._score.pending or "kl/beta" not in metrics):
            raise RuntimeError(f"the penalty of {self._spec} never reached the advantages")
        return advantages, metrics

    def checked(self, metrics: dict[str, float]) -> dict[str, float]:
        """Return an update's metrics with the KL's as means over tokens, as veRL's trainers log them."""
        from kl_plugins.adapters.verl.metrics import finish

        found = finish(metrics, prefix="")
        if self._spec and self._score is None and not found:
            raise RuntimeError(f"the update returned no kl/ metrics, so {self._spec} was not applied in it")
        return metrics
