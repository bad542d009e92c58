"""The KL settings of the hosts' own example configs, written down as facts: each is explained as what it is.

Each row names one example of the host's repository with these settings (TRL July 2026, veRL January 2026, OpenRLHF
August 2026). Many other examples have the same ones.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest

from tests.support.configs import explained


class Example(NamedTuple):
    """One example: its host, its path in the host's repository, its KL settings, and the spec of the same gradient."""

    host: str
    file: str
    settings: str
    spec: str
    version: str = ""


VERL_KEYS = {"A.": "actor_rollout_ref.actor.", "R.": "algorithm."}
NONE = "none"

EXAMPLES = [
    Example(
        "verl",
        "grpo_trainer/run_deepseek7b_llm.sh",
        "R.adv_estimator=grpo A.use_kl_loss=True A.kl_loss_coef=0.001 A.kl_loss_type=low_var_kl "
        "R.use_kl_in_reward=False",
        "k3@loss",
    ),
    Example(
        "verl",
        "ppo_trainer/run_deepseek7b_llm.sh",
        "R.adv_estimator=gae A.use_kl_loss=False R.use_kl_in_reward=False",
        NONE,
    ),
    Example(
        "verl",
        "grpo_trainer/run_qwen3moe-30b_megatron_96gb.sh",
        "R.adv_estimator=grpo R.use_kl_in_reward=False R.kl_ctrl.kl_coef=0.0 A.use_kl_loss=False "
        "A.kl_loss_coef=0.0 A.loss_agg_mode=token-mean",
        NONE,
    ),
    Example(
        "verl",
        "grpo_trainer/run_glm41v_9b.sh",
        "R.adv_estimator=grpo A.use_kl_loss=True A.kl_loss_coef=0.01 A.kl_loss_type=low_var_kl "
        "R.use_kl_in_reward=False",
        "k3@loss",
    ),
    Example(
        "verl",
        "grpo_trainer/run_deepseek671b_math_megatron_96gb.sh",
        "R.adv_estimator=grpo R.use_kl_in_reward=False R.kl_ctrl.kl_coef=0.0 A.use_kl_loss=True "
        "A.kl_loss_coef=0.001 A.loss_agg_mode=token-mean",
        "k3@loss",
    ),
    Example(
        "verl",
        "gmpo_trainer/test_dapo_7b_math.sh",
        "R.adv_estimator=grpo R.use_kl_in_reward=False A.use_kl_loss=False "
        "A.policy_loss.loss_mode=geo_mean A.loss_agg_mode=token-mean",
        NONE,
    ),
    Example(
        "verl",
        "gspo_trainer/test_gspo_3b_math.sh",
        "R.adv_estimator=grpo A.policy_loss.loss_mode=gspo R.use_kl_in_reward=False A.use_kl_loss=False "
        "A.loss_agg_mode=seq-mean-token-mean",
        NONE,
    ),
    Example(
        "verl",
        "remax_trainer/run_qwen2.5-3b_seq_balance.sh",
        "R.adv_estimator=remax A.use_kl_loss=False R.use_kl_in_reward=True R.kl_penalty=kl R.kl_ctrl.kl_coef=0.001",
        "k1@reward",
    ),
    Example(
        "verl",
        "cispo_trainer/run_cispo_qwen2_5_0_5b_gsm8k.sh",
        "R.adv_estimator=grpo A.policy_loss.loss_mode=cispo A.use_kl_loss=True A.kl_loss_coef=0.001 "
        "A.kl_loss_type=low_var_kl",
        "k3@loss",
    ),
    Example(
        "verl",
        "gpg_trainer/run_qwen2-7b_math.sh",
        "R.adv_estimator=gpg A.use_kl_loss=False A.policy_loss.loss_mode=gpg A.kl_loss_coef=0.001 "
        "A.kl_loss_type=low_var_kl R.use_kl_in_reward=False",
        NONE,
    ),
    Example(
        "verl",
        "reinforce_plus_plus_trainer/run_qwen2-7b_math_rf.sh",
        "R.adv_estimator=reinforce_plus_plus A.use_kl_loss=False A.kl_loss_coef=0.001 A.kl_loss_type=mse "
        "R.use_kl_in_reward=True",
        "k1@reward",
    ),
    Example(
        "verl",
        "rloo_trainer/run_qwen2-7b.sh",
        "R.adv_estimator=rloo A.use_kl_loss=False R.use_kl_in_reward=True R.kl_penalty=kl R.kl_ctrl.kl_coef=0.001",
        "k1@reward",
    ),
    Example(
        "verl",
        "sapo_trainer/run_qwen30b_sapo.sh",
        "R.adv_estimator=grpo R.use_kl_in_reward=False R.kl_ctrl.kl_coef=0.001 A.use_kl_loss=False "
        "A.kl_loss_coef=0.001 A.policy_loss.loss_mode=sapo",
        NONE,
    ),
    Example(
        "verl", "otb_trainer/run_qwen2_5-7b.sh", "R.adv_estimator=optimal_token_baseline A.use_kl_loss=False", NONE
    ),
    Example(
        "verl",
        "fully_async_policy/shell/grpo_30b_a3b_base_math_megatron_96_32_mis.sh",
        "R.adv_estimator=grpo R.rollout_correction.rollout_is=null "
        "R.rollout_correction.rollout_rs=seq_mean_k1 A.use_kl_loss=True A.kl_loss_coef=0.001 "
        "A.loss_agg_mode=token-mean",
        "k3@loss",
    ),
    Example(
        "verl",
        "special_e2e/run_transferqueue.sh",
        "R.adv_estimator=grpo A.use_kl_loss=True A.kl_loss_coef=0.0 A.loss_agg_mode=token-mean",
        NONE,
    ),
    Example(
        "openrlhf",
        "train_dapo_ray_hybrid_engine.sh",
        "--algo.kl.init_coef 1e-3 --algo.kl.use_loss --algo.kl.estimator k3 --algo.advantage.estimator "
        "group_norm --algo.advantage.is_correction_enable",
        "k3@loss",
        "0.11.1",
    ),
    Example(
        "openrlhf",
        "train_ppo_ray_hybrid_engine.sh",
        "--algo.kl.init_coef 0.01 --train.dynamic_batch_enable --algo.advantage.is_correction_enable",
        "k1@reward",
        "0.11.1",
    ),
    Example(
        "openrlhf",
        "train_ppo_with_reward_fn.sh",
        "--algo.kl.init_coef 0.01 --rollout.batch_size 1024 --train.batch_size 128",
        "k1@reward",
    ),
    Example(
        "openrlhf",
        "train_prorlv2_math_hybrid_engine.sh",
        "--algo.kl.init_coef 1e-4 --algo.kl.use_loss --algo.kl.estimator k2 --algo.advantage.estimator "
        "reinforce_baseline --algo.advantage.is_correction_enable "
        "--algo.advantage.is_correction_threshold 0.5 5.0 --algo.advantage.is_correction_type icepop",
        "k2@loss",
        "0.11.1",
    ),
    Example(
        "openrlhf",
        "train_reinforce_baseline_ray_agent_async.sh",
        "--train.async_enable --train.partial_rollout_enable --algo.kl.init_coef 1e-5 --algo.kl.use_loss "
        "--algo.kl.estimator k2",
        "k2@loss",
    ),
    Example(
        "openrlhf",
        "train_vlm_math_hybrid_engine.sh",
        "--algo.kl.init_coef 0 --algo.kl.use_loss --algo.kl.estimator k2",
        NONE,
    ),
    Example(
        "trl",
        "examples/scripts/gspo.py",
        "--importance_sampling_level sequence --beta 0.0 --loss_type grpo --gradient_accumulation_steps "
        "2 --steps_per_generation 8",
        NONE,
    ),
    Example(
        "trl",
        "examples/scripts/grpo_vlm.py",
        "--max_completion_length 1024 --use_vllm --vllm_mode colocate --use_peft --gradient_accumulation_steps 2",
        NONE,
    ),
    Example(
        "trl",
        "examples/scripts/rloo.py",
        "RLOOConfig(gradient_accumulation_steps=2, steps_per_generation=8, use_vllm=True, vllm_mode='colocate')",
        "k1@reward",
    ),
    Example(
        "trl",
        "docs/source/paper_index.md",
        "GRPOConfig(loss_type='dr_grpo', beta=0.001, scale_rewards=False)",
        "k3@loss",
        "1.9.0",
    ),
    Example(
        "trl",
        "docs/source/paper_index.md",
        "GRPOConfig(beta=0.001, use_bias_correction_kl=True)",
        "k2@loss/is:token/behaviour:old",
    ),
    Example(
        "trl",
        "docs/source/paper_index.md",
        "GRPOConfig(loss_type='luspo', beta=0.0, importance_sampling_level='sequence')",
        NONE,
    ),
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"{example.host}-{example.file}")
def test_an_example_of_a_host_is_explained_as_what_it_is(example: Example) -> None:
    text = example.settings
    for short, key in VERL_KEYS.items() if example.host == "verl" else ():
        text = f" {text}".replace(f" {short}", f" {key}").strip()
    told = explained(example.host, text, example.version)
    if example.spec == NONE:
        assert told.statements["KL"].startswith("none")
    else:
        assert told.statements["as a spec"] == f"Its gradient is that of {example.spec}."
    assert not [finding for finding in told.findings if finding.severity == "error"]
    assert "foreign-setting" not in {finding.rule for finding in told.findings}
    assert told.settings
