"""veRL's defaults and modes that matter for the KL, by version; a test compares them with the installed veRL."""

from __future__ import annotations

from typing import Any

from packaging.version import Version

from kl_plugins.adapters.aggregations import Rule

ACTOR, ROLLOUT, MODEL = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout.", "actor_rollout_ref.model."
ALGORITHM, CORRECTION, TRAINER = "algorithm.", "algorithm.rollout_correction.", "trainer."

PLUS_WORKS = Version("0.8")
"""From this version on, ``k3+`` and the like work; before it they raised NotImplementedError."""

SAMPLER_BY_DEFAULT = Version("0.9")
"""From this version on, ``rollout.calculate_log_probs`` is taken to be True by default."""

DEFAULTS: dict[str, Any] = {
    f"{ACTOR}use_kl_loss": False,
    f"{ACTOR}kl_loss_type": "low_var_kl",
    f"{ACTOR}kl_loss_coef": 0.001,
    f"{ACTOR}loss_agg_mode": "token-mean",
    f"{ACTOR}loss_scale_factor": None,
    f"{ACTOR}policy_loss.loss_mode": "vanilla",
    f"{ACTOR}policy_loss.ppo_kl_coef": 0.1,
    f"{ACTOR}ppo_epochs": 1,
    f"{ACTOR}ppo_mini_batch_size": 256,
    f"{ACTOR}strategy": "fsdp",
    f"{ACTOR}ulysses_sequence_parallel_size": 1,
    f"{ACTOR}use_prefix_grouper": False,
    f"{ROLLOUT}name": None,
    f"{ROLLOUT}n": 1,
    f"{ROLLOUT}temperature": 1.0,
    f"{ROLLOUT}top_p": 1.0,
    f"{ROLLOUT}top_k": -1,
    f"{ROLLOUT}min_p": None,
    f"{ROLLOUT}repetition_penalty": None,
    f"{ROLLOUT}logprobs_mode": "processed_logprobs",
    f"{ROLLOUT}calculate_log_probs": True,
    f"{ROLLOUT}multi_turn.enable": False,
    f"{MODEL}lora_rank": 0,
    f"{MODEL}lora_adapter_path": None,
    f"{MODEL}use_fused_kernels": False,
    "data.train_batch_size": 1024,
    "data.max_response_length": 512,
    f"{ALGORITHM}adv_estimator": "gae",
    f"{ALGORITHM}norm_adv_by_std_in_grpo": True,
    f"{ALGORITHM}use_kl_in_reward": False,
    f"{ALGORITHM}kl_penalty": "kl",
    f"{ALGORITHM}kl_ctrl.type": "fixed",
    f"{ALGORITHM}kl_ctrl.kl_coef": 0.001,
    f"{ALGORITHM}kl_ctrl.horizon": 10000,
    f"{ALGORITHM}kl_ctrl.target_kl": 0.1,
    f"{CORRECTION}rollout_is": None,
    f"{CORRECTION}rollout_rs": None,
    f"{CORRECTION}bypass_mode": False,
    f"{TRAINER}use_v1": True,
    f"{TRAINER}v1.trainer_mode": "sync",
}

NOT_IN_EVERY_CONFIG = (f"{ROLLOUT}min_p", f"{ROLLOUT}repetition_penalty", f"{ACTOR}use_prefix_grouper")
"""Keys above that veRL's own default config need not have."""

KL_KEYS = frozenset(
    {
        *(key for key in DEFAULTS if "kl" in key.replace("vanilla", "").lower()),
        f"{ACTOR}policy_loss.kl_cov_ratio",
        f"{ALGORITHM}kl_ctrl",
        f"{ALGORITHM}kl_ctrl._target_",
    }
)
"""veRL's settings whose names contain ``kl``."""

ESTIMATORS = {
    **dict.fromkeys(("kl", "k1"), "k1"),
    **dict.fromkeys(("mse", "k2"), "k2"),
    **dict.fromkeys(("low_var_kl", "k3"), "k3"),
    "abs": "abs",
}
"""kl-plugins' name of each of veRL's estimators."""

RULES: dict[str, Rule] = {
    "token-mean": "batch",
    "token-sum": "responses",
    "seq-mean-token-sum": "responses",
    "seq-mean-token-mean": "response",
    "seq-mean-token-sum-norm": "longest",
}
"""How much each token counts, by ``loss_agg_mode``; with a ``loss_scale_factor``, the last one is a constant."""


def defaults(version: Version) -> dict[str, Any]:
    """Return the defaults of a version.

    Args:
        version: the version of veRL.
    """
    found = dict(DEFAULTS)
    if version < SAMPLER_BY_DEFAULT:
        found |= {f"{ROLLOUT}calculate_log_probs": False, f"{TRAINER}use_v1": False}
    return found
