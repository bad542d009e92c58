"""TRL's defaults and modes that matter for the KL, by version; a test compares them with the installed TRL."""

from __future__ import annotations

from typing import Any

from packaging.version import Version

from kl_plugins.adapters.aggregations import Rule

BIAS_CORRECTION_BY_DEFAULT = Version("1.10")
"""From this version on, ``use_bias_correction_kl`` is True by default (trl#6503)."""

LONGER_BY_DEFAULT = Version("1.9")
"""From this version on, the default of ``max_completion_length`` is known to be 512."""

COMMON: dict[str, Any] = {
    "num_generations": 8,
    "max_completion_length": 512,
    "steps_per_generation": None,
    "generation_batch_size": None,
    "gradient_accumulation_steps": 1,
    "num_iterations": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "use_vllm": False,
    "vllm_mode": "colocate",
    "vllm_server_base_url": None,
    "vllm_server_host": "0.0.0.0",
    "vllm_server_port": 8000,
    "disable_dropout": False,
    "sync_ref_model": False,
    "ref_model_mixup_alpha": 0.6,
    "ref_model_sync_steps": 512,
    "mask_truncated_completions": False,
    "use_peft": False,
    "kl": None,
}
"""Defaults that GRPO and RLOO share. ``use_peft`` is of TRL's ModelConfig, ``kl`` of kl-plugins."""

GRPO: dict[str, Any] = {
    **COMMON,
    "beta": 0.0,
    "use_bias_correction_kl": True,
    "loss_type": "dapo",
    "importance_sampling_level": "token",
    "scale_rewards": "group",
    "multi_objective_aggregation": "sum_then_normalize",
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "vllm_importance_sampling_correction": True,
    "vllm_importance_sampling_mode": "sequence_mask",
    "use_liger_kernel": False,
}
RLOO: dict[str, Any] = {**COMMON, "num_generations": 2, "beta": 0.05, "normalize_advantages": False}

NOT_OF_THE_CONFIG = ("use_peft", "kl")
"""Keys above that TRL's GRPOConfig and RLOOConfig do not have."""

RULES: dict[str, Rule] = {
    "dapo": "batch",
    "cispo": "batch",
    "vespo": "batch",
    "bnpo": "micro-batch",
    "grpo": "response",
    "sapo": "response",
    "dr_grpo": "constant",
    "luspo": "responses",
}
"""How much each token counts, by ``loss_type``."""

KL_KEYS = frozenset({"kl", "use_bias_correction_kl"})
"""TRL's settings whose names contain ``kl``, and the one of kl-plugins."""


def defaults(algorithm: str, version: Version) -> dict[str, Any]:
    """Return the defaults of a trainer's config.

    Args:
        algorithm: ``GRPO`` or ``RLOO``.
        version: the version of TRL.
    """
    found = dict(RLOO if algorithm == "RLOO" else GRPO)
    if algorithm != "RLOO" and version < BIAS_CORRECTION_BY_DEFAULT:
        found["use_bias_correction_kl"] = False
    if version < LONGER_BY_DEFAULT:
        found["max_completion_length"] = None
    return found
