"""OpenRLHF's defaults and flags that matter for the KL, by version; a test compares them with the installed one."""

from __future__ import annotations

from typing import Any

from packaging.version import Version

KL, ADVANTAGE = "algo.kl.", "algo.advantage."

DOTTED_SINCE = Version("0.10.2")
"""From this version on, flags have dots; before it they were flat (``--init_kl_coef``)."""

LEVELS_SINCE = Version("0.11.2")
"""From this version on, ``is_correction_level`` replaces ``is_correction_enable``."""

UNBIASED_SINCE = Version("0.11.1")
"""The first version with ``--algo.kl.unbiased_gradient``."""

DEFAULTS: dict[str, Any] = {
    f"{KL}init_coef": 0.01,
    f"{KL}estimator": "k1",
    f"{KL}use_loss": False,
    f"{KL}unbiased_gradient": False,
    f"{KL}target": None,
    f"{KL}horizon": 10000,
    f"{ADVANTAGE}estimator": "gae",
    f"{ADVANTAGE}no_std_norm": False,
    f"{ADVANTAGE}is_correction_level": "off",
    "actor.policy_loss_type": "ppo",
    "actor.loss_agg_mode": "token-mean",
    "rollout.batch_size": 1024,
    "rollout.n_samples_per_prompt": 1,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "rollout.max_new_tokens": None,
    "train.batch_size": 128,
    "train.max_epochs": 1,
    "train.async_enable": False,
    "train.partial_rollout_enable": False,
    "train.dynamic_batch_enable": False,
    "train.agent_func_path": None,
    "ds.lora.rank": 0,
    "ds.tensor_parallel_size": 1,
    "ds.ring_attn_size": 1,
    "ds.packing_samples": False,
    "data.max_images_per_prompt": 0,
    "vllm.num_engines": None,
}

KL_KEYS = frozenset(key for key in DEFAULTS if key.startswith(KL))
"""OpenRLHF's flags about the KL, without the dashes."""

FLAT = {
    "init_kl_coef": f"{KL}init_coef",
    "kl_estimator": f"{KL}estimator",
    "use_kl_loss": f"{KL}use_loss",
    "kl_target": f"{KL}target",
    "kl_horizon": f"{KL}horizon",
    "advantage_estimator": f"{ADVANTAGE}estimator",
    "no_advantage_std_norm": f"{ADVANTAGE}no_std_norm",
    "policy_loss_type": "actor.policy_loss_type",
    "rollout_batch_size": "rollout.batch_size",
    "n_samples_per_prompt": "rollout.n_samples_per_prompt",
    "temperature": "rollout.temperature",
    "top_p": "rollout.top_p",
    "train_batch_size": "train.batch_size",
    "max_epochs": "train.max_epochs",
    "async_train": "train.async_enable",
    "partial_rollout": "train.partial_rollout_enable",
    "use_dynamic_batch": "train.dynamic_batch_enable",
    "enable_vllm_is_correction": f"{ADVANTAGE}is_correction_enable",
}
"""The flat flags of older versions, and what they are called now."""


def defaults(version: Version) -> dict[str, Any]:
    """Return the defaults of a version.

    Args:
        version: the version of OpenRLHF.
    """
    found = dict(DEFAULTS)
    if version < UNBIASED_SINCE:
        del found[f"{KL}unbiased_gradient"]
    if version < LEVELS_SINCE:
        del found[f"{ADVANTAGE}is_correction_level"], found["actor.loss_agg_mode"]
        found[f"{ADVANTAGE}is_correction_enable"] = False
    return found
