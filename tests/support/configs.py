"""Configs for every rule of ``kl-plugins explain --host``: one that it is about, and near ones that it is not about."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from kl_plugins.explain.config import ConfigExplanation, ConfigFinding
from kl_plugins.hosts import Host, discover_hosts


class Row(NamedTuple):
    """A rule, words of a config that it is about, and words of configs that it is not about."""

    rule: str
    host: str
    hit: str
    misses: tuple[str, ...]
    version: str = ""


V = "actor_rollout_ref.actor."
LOSS = f"{V}use_kl_loss=True {V}kl_loss_coef=0.1 "
REWARD = "algorithm.use_kl_in_reward=True algorithm.kl_ctrl.kl_coef=0.1 "

ROWS: list[Row] = [
    # All hosts.
    Row("k3-is-forward-kl", "trl", "beta=0.1 use_bias_correction_kl=False", ("beta=0.1", "beta=0.1 kl=k3@loss")),
    Row(
        "no-weight-on-stale-data",
        "trl",
        "beta=0.1 num_iterations=2 use_bias_correction_kl=False",
        (
            "beta=0.1 num_iterations=2",
            "beta=0.1 use_bias_correction_kl=False",
            "beta=0.1 kl=exact@loss num_iterations=2",
        ),
    ),
    Row(
        "no-weight-on-stale-data",
        "trl",
        "beta=0.1 steps_per_generation=8 kl=k2@loss",
        ("beta=0.1 steps_per_generation=8 gradient_accumulation_steps=8 kl=k2@loss",),
    ),
    Row(
        "weight-without-floor-on-stale-data",
        "trl",
        "beta=0.1 num_iterations=2",
        ("beta=0.1", "beta=0.1 num_iterations=2 kl=default"),
    ),
    Row("mean-per-response", "trl", "beta=0.1 loss_type=grpo", ("beta=0.1 loss_type=dapo", "loss_type=grpo")),
    Row("truncated-sampling", "trl", "beta=0.1 top_p=0.9", ("beta=0.1 top_p=1.0 top_k=0", "top_p=0.9")),
    Row("negative-beta", "trl", "beta=-0.1", ("beta=0.1",)),
    Row("foreign-setting", "trl", "beta=0.1 kl_coef=0.1", ("beta=0.1 use_bias_correction_kl=True",)),
    Row("unknown-value", "trl", "beta=$BETA", ("beta=0.1", "beta=0.1 output_dir=$HOME")),
    Row("unknown-value", "trl", "beta=auto", ("beta=1e-3",)),
    Row("version-not-checked", "trl", "beta=0.1", (), "0.20.0"),
    Row("reading", "trl", "trl grpo --config none-such", ("beta=0.1",)),
    Row("observed", "trl", "beta=0.1 kl=observe", ("beta=0.1 kl=k2@loss", "beta=0.1")),
    Row(
        "observed",
        "verl",
        LOSS + f"{V}kl_loss_type=k3/observe:k2@loss/probe:10",
        (LOSS + f"{V}kl_loss_type=k3", LOSS + f"{V}kl_loss_type=default"),
    ),
    Row("refused", "trl", "beta=0 kl=observe", ("beta=0.1 kl=observe:k2@loss/is:token",)),
    Row("refused", "trl", "beta=0.1 kl=k3/observe", ("beta=0.1 kl=observe/probe:5",)),
    Row("refused", "trl", "beta=0.1 kl=observe:k2@los", ("beta=0.1 kl=observe:k1@loss",)),
    Row("refused", "trl", "beta=0.1 kl=observe:exact@loss", ("beta=0.1 kl=observe:exact@loss/top",)),
    Row("refused", "trl", "trl rloo --beta 0.1 --kl observe:exact@loss/top", ("beta=0.1 kl=observe:exact@loss/top:8",)),
    Row(
        "refused",
        "verl",
        "algorithm.use_kl_in_reward=True algorithm.kl_penalty=kl/observe:exact@loss/top",
        (LOSS + f"{V}kl_loss_type=k3/observe:exact@loss/top",),
    ),
    Row("refused", "verl", f"{V}kl_loss_type=observe", (LOSS + f"{V}kl_loss_type=observe",)),
    Row("refused", "verl", LOSS + f"{V}kl_loss_type=k4/observe", (LOSS + f"{V}kl_loss_type=k3+/observe",)),
    Row("refused", "trl", "beta=0 kl=k2@loss", ("beta=0.1 kl=k2@loss",)),
    Row("refused", "trl", "beta=0.1 kl=k2@los", ("beta=0.1 kl=default",)),
    Row("refused", "trl", "beta=0.1 kl=k1@loss", ("beta=0.1 kl=k1@loss/allow:biased",)),
    Row("refused", "trl", "beta=0.1 kl=exact@advantage loss_type=vespo", ("beta=0.1 kl=exact@advantage",)),
    Row(
        "refused",
        "trl",
        "beta=0.1 kl=k2@loss/is:prefix/behaviour:sampler use_vllm=True top_p=0.9",
        ("beta=0.1 kl=k2@loss/is:prefix use_vllm=True",),
    ),
    Row("spec-without-divergence", "trl", "beta=0.1 kl=k1@loss/allow:biased", ("beta=0.1 kl=k1@advantage", "beta=0.1")),
    # TRL.
    Row("trl-beta-is-zero", "trl", "loss_type=dapo", ("beta=0.1", "rloo", "kl=k2@loss")),
    Row(
        "trl-ignored-without-beta",
        "trl",
        "use_bias_correction_kl=True",
        ("beta=0.1 use_bias_correction_kl=True", "beta=0"),
    ),
    Row(
        "trl-sync-without-reference",
        "trl",
        "sync_ref_model=True",
        ("beta=0.1 sync_ref_model=True", "sync_ref_model=False"),
    ),
    Row(
        "trl-sync-with-peft",
        "trl",
        "beta=0.1 sync_ref_model=True use_peft=True",
        ("beta=0.1 sync_ref_model=True", "beta=0.1 use_peft=True"),
    ),
    Row(
        "trl-sync-with-peft",
        "trl",
        "GRPOTrainer(args=GRPOConfig(beta=0.1, sync_ref_model=True), peft_config=LoraConfig())",
        ("GRPOTrainer(args=GRPOConfig(beta=0.1, sync_ref_model=True))",),
    ),
    Row(
        "trl-sequence-ratio-on-tokens",
        "trl",
        "beta=0.1 importance_sampling_level=sequence",
        (
            "beta=0.1",
            "beta=0.1 importance_sampling_level=sequence use_bias_correction_kl=False",
            "beta=0.1 importance_sampling_level=sequence kl=default",
            "importance_sampling_level=sequence",
        ),
    ),
    Row(
        "trl-default-flipped",
        "trl",
        "beta=0.1",
        ("beta=0.1 use_bias_correction_kl=True", "beta=0", "rloo beta=0.1"),
        "1.10.0",
    ),
    Row("trl-default-will-flip", "trl", "beta=0.1", ("beta=0.1 use_bias_correction_kl=False",), "1.9.0"),
    Row("trl-engine-mismatch", "trl", "beta=0.1 use_vllm=True", ("beta=0.1", "beta=0.1 use_vllm=True kl=default")),
    Row("trl-k3-overflow", "trl", "beta=0.1", ("beta=0.1 kl=k3@loss", "rloo beta=0.1")),
    Row(
        "trl-masks-spare-the-kl",
        "trl",
        "beta=0.1 off_policy_mask_threshold=0.5",
        ("beta=0.1", "off_policy_mask_threshold=0.5"),
    ),
    Row("trl-masks-spare-the-kl", "trl", "beta=0.1 top_entropy_quantile=0.2", ("beta=0.1 top_entropy_quantile=1.0",)),
    Row("trl-groups-without-signal", "trl", "beta=0.1", ("beta=0", "rloo beta=0.1")),
    Row("trl-luspo-sums", "trl", "beta=0.1 loss_type=luspo", ("beta=0.1 loss_type=dapo",)),
    Row("trl-luspo-padding", "trl", "beta=0.1 loss_type=luspo", ("beta=0.1 loss_type=dapo",), "1.9.0"),
    Row(
        "trl-normaliser-changed",
        "trl",
        "beta=0.1 steps_per_generation=8",
        (
            "beta=0.1 steps_per_generation=8 gradient_accumulation_steps=8",
            "beta=0.1 loss_type=grpo steps_per_generation=8",
        ),
    ),
    Row(
        "trl-temperatures-differ",
        "trl",
        "beta=0.1 generation_kwargs.temperature=0.7",
        ("beta=0.1 generation_kwargs.temperature=0.7 temperature=0.7",),
    ),
    Row("trl-lora-reference", "trl", "beta=0.1 use_peft=True", ("beta=0.1", "use_peft=True")),
    Row("trl-dropout", "trl", "beta=0.1 use_peft=True", ("beta=0.1 use_peft=True disable_dropout=True", "beta=0.1")),
    Row("trl-liger-loss", "trl", "beta=0.1 use_liger_kernel=True", ("beta=0.1 use_liger_kernel=False",), "1.13.0"),
    Row("trl-rloo-standardised", "trl", "rloo normalize_advantages=True", ("rloo normalize_advantages=False",)),
    Row("trl-rloo-has-no-k3", "trl", "rloo", ("rloo beta=0", "beta=0.1")),
    Row(
        "trl-async-has-no-kl",
        "trl",
        "AsyncGRPOConfig(beta=0.1)",
        ("AsyncGRPOConfig(max_steps=2)", "GRPOConfig(beta=0.1)"),
    ),
    Row(
        "trl-server-logprobs",
        "trl",
        "beta=0.1 use_vllm=True vllm_mode=server",
        ("beta=0.1 use_vllm=True", "beta=0.1 vllm_mode=server"),
    ),
    Row(
        "trl-unsloth",
        "trl",
        "import unsloth\nfrom trl import GRPOConfig\nGRPOConfig(beta=0.1)",
        ("from trl import GRPOConfig\nGRPOConfig(beta=0.1)",),
    ),
    Row("trl-unknown-loss-type", "trl", "beta=0.1 loss_type=ppo", ("beta=0.1 loss_type=bnpo",)),
]
ROWS += [
    Row(
        "k1-in-loss",
        "verl",
        LOSS + f"{V}kl_loss_type=kl",
        (LOSS + f"{V}kl_loss_type=kl+", f"{V}kl_loss_type=kl", REWARD + "algorithm.kl_penalty=kl"),
    ),
    Row(
        "score-of-another-estimator",
        "verl",
        REWARD + "algorithm.kl_penalty=low_var_kl",
        (REWARD, "algorithm.kl_penalty=low_var_kl", REWARD + "algorithm.kl_penalty=k1@advantage"),
    ),
    Row("k3-is-forward-kl", "verl", LOSS, (LOSS + f"{V}kl_loss_type=low_var_kl+", LOSS + f"{V}kl_loss_type=mse")),
    Row("no-weight-on-stale-data", "verl", LOSS, (LOSS + "data.train_batch_size=256", LOSS + f"{V}kl_loss_type=kl")),
    Row(
        "no-weight-on-stale-data",
        "verl",
        LOSS + "data.train_batch_size=256 trainer.v1.trainer_mode=separate_async",
        (LOSS + "data.train_batch_size=256",),
    ),
    Row("foreign-setting", "verl", LOSS + f"+{V}kl_coef=0.1", (LOSS + REWARD,)),
    Row("refused", "verl", LOSS + f"{V}kl_loss_type=k1@advantage", (LOSS + f"{V}kl_loss_type=default",)),
    Row("refused", "verl", f"{V}kl_loss_type=default", (LOSS + f"{V}kl_loss_type=default",)),
    Row("refused", "verl", LOSS + f"{V}kl_loss_type=default {V}strategy=megatron", (LOSS + f"{V}strategy=megatron",)),
    Row("verl-no-kl", "verl", "algorithm.adv_estimator=grpo", (LOSS, REWARD)),
    Row("verl-loss-settings-ignored", "verl", f"{V}kl_loss_coef=0.1", (LOSS, f"{V}kl_loss_coef=0.0")),
    Row(
        "verl-loss-settings-ignored",
        "verl",
        f"{V}kl_loss_type=mse",
        (LOSS + f"{V}kl_loss_type=mse", f"{V}use_kl_loss=False"),
    ),
    Row(
        "verl-reward-settings-ignored",
        "verl",
        "algorithm.kl_ctrl.kl_coef=0.1",
        (REWARD, "algorithm.kl_ctrl.kl_coef=0.0"),
    ),
    Row(
        "verl-reward-settings-ignored", "verl", LOSS + "algorithm.kl_penalty=mse", (REWARD + "algorithm.kl_penalty=kl",)
    ),
    Row("verl-zero-coefficient", "verl", f"{V}use_kl_loss=True {V}kl_loss_coef=0", (LOSS, f"{V}kl_loss_coef=0")),
    Row("verl-zero-coefficient", "verl", "algorithm.use_kl_in_reward=True algorithm.kl_ctrl.kl_coef=0", (REWARD,)),
    Row("verl-both-placements", "verl", LOSS + REWARD, (LOSS, REWARD)),
    Row(
        "verl-unknown-estimator",
        "verl",
        LOSS + f"{V}kl_loss_type=full",
        (LOSS + f"{V}kl_loss_type=k3+", LOSS + f"{V}kl_loss_type=default", f"{V}kl_loss_type=full"),
    ),
    Row("verl-plus-fails", "verl", LOSS + f"{V}kl_loss_type=k3+", (LOSS + f"{V}kl_loss_type=k3",), "0.7.1"),
    Row(
        "verl-k3-clamp",
        "verl",
        LOSS,
        (LOSS + f"{V}kl_loss_type=mse", LOSS + f"{V}kl_loss_type=k3+", LOSS + f"{V}kl_loss_type=k3@loss"),
    ),
    Row(
        "verl-weights-spare-the-kl",
        "verl",
        LOSS + "algorithm.rollout_correction.rollout_is=token",
        (LOSS, LOSS + f"{V}kl_loss_type=default algorithm.rollout_correction.rollout_is=token"),
    ),
    Row(
        "verl-rejection-shrinks-the-kl",
        "verl",
        LOSS + "algorithm.rollout_correction.rollout_rs=seq_mean_k1",
        (LOSS, LOSS + f"algorithm.rollout_correction.rollout_rs=seq_mean_k1 {V}loss_agg_mode=seq-mean-token-sum"),
    ),
    Row(
        "verl-kl-of-the-engine",
        "verl",
        REWARD + "algorithm.rollout_correction.bypass_mode=True",
        (REWARD, LOSS + "algorithm.rollout_correction.bypass_mode=True"),
    ),
    Row(
        "verl-reward-divided-by-std",
        "verl",
        REWARD + "algorithm.adv_estimator=grpo",
        (
            REWARD,
            REWARD + "algorithm.adv_estimator=grpo algorithm.norm_adv_by_std_in_grpo=False",
            LOSS + "algorithm.adv_estimator=grpo",
            REWARD + "algorithm.adv_estimator=grpo algorithm.kl_penalty=k1@advantage",
        ),
    ),
    Row(
        "verl-estimator-drops-the-kl",
        "verl",
        REWARD + "algorithm.adv_estimator=gdpo",
        (REWARD, LOSS + "algorithm.adv_estimator=gdpo"),
    ),
    Row(
        "verl-adaptive-not-saved",
        "verl",
        REWARD + "algorithm.kl_ctrl.type=adaptive",
        (REWARD, REWARD + "algorithm.kl_ctrl.type=adaptive algorithm.kl_penalty=k1@advantage"),
    ),
    Row(
        "verl-adaptive-ignored",
        "verl",
        LOSS + "algorithm.kl_ctrl.type=adaptive",
        (REWARD + "algorithm.kl_ctrl.type=adaptive", LOSS),
    ),
    Row(
        "verl-mean-by-micro-batch",
        "verl",
        LOSS + f"{V}loss_agg_mode=seq-mean-token-sum-norm",
        (LOSS, LOSS + f"{V}loss_agg_mode=seq-mean-token-sum-norm {V}loss_scale_factor=512"),
    ),
    Row(
        "verl-sum-of-tokens",
        "verl",
        LOSS + f"{V}loss_agg_mode=seq-mean-token-sum",
        (LOSS, REWARD + f"{V}loss_agg_mode=seq-mean-token-sum"),
    ),
    Row("mean-per-response", "verl", LOSS + f"{V}loss_agg_mode=seq-mean-token-mean", (LOSS,)),
    Row("verl-unknown-aggregation", "verl", LOSS + f"{V}loss_agg_mode=mean", (LOSS,)),
    Row("verl-ppo-kl-is-another", "verl", f"{V}policy_loss.ppo_kl_coef=0.1", (LOSS,)),
    Row(
        "verl-raw-logprobs",
        "verl",
        LOSS + "actor_rollout_ref.rollout.logprobs_mode=raw_logprobs actor_rollout_ref.rollout.temperature=0.7",
        (
            LOSS + "actor_rollout_ref.rollout.temperature=0.7",
            LOSS + "actor_rollout_ref.rollout.logprobs_mode=raw_logprobs",
        ),
    ),
    Row(
        "truncated-sampling",
        "verl",
        LOSS + "actor_rollout_ref.rollout.top_p=0.9",
        (LOSS + "actor_rollout_ref.rollout.val_kwargs.top_p=0.9",),
    ),
    Row(
        "verl-lora-reference",
        "verl",
        LOSS + "actor_rollout_ref.model.lora_rank=8",
        (LOSS, "actor_rollout_ref.model.lora_rank=8"),
    ),
    Row(
        "verl-k1-reward-in-groups",
        "verl",
        REWARD + "algorithm.adv_estimator=grpo",
        (REWARD, LOSS + "algorithm.adv_estimator=grpo"),
    ),
]
C = "algorithm.rollout_correction."

ROWS += [
    Row(
        "verl-bypass-drops-the-correction",
        "verl",
        f"{C}bypass_mode=True {C}rollout_is=token",
        (
            f"{C}bypass_mode=True",
            f"{C}rollout_is=token",
            f"{C}bypass_mode=True {C}rollout_is=token trainer.use_v1=False",
        ),
        "0.9.1",
    ),
    Row("trl-constant-divisor", "trl", "beta=0.1 loss_type=dr_grpo", ("beta=0.1", "loss_type=dr_grpo")),
    Row(
        "verl-engine-mismatch",
        "verl",
        LOSS,
        (REWARD, LOSS + "algorithm.rollout_correction.rollout_is=token", LOSS + f"{V}kl_loss_type=default"),
    ),
    Row("score-behind-the-clip", "trl", "rloo num_iterations=2", ("rloo", "beta=0.1 num_iterations=2")),
    Row("score-behind-the-clip", "verl", REWARD, (LOSS, REWARD + "data.train_batch_size=256")),
    Row(
        "trl-reward-divided-by-std",
        "trl",
        "beta=0.1 kl=k1@reward",
        (
            "beta=0.1 kl=k1@reward scale_rewards=none",
            "beta=0.1 kl=k1@reward scale_rewards=False",
            "beta=0.1 kl=k1@advantage",
            "rloo kl=k1@reward",
        ),
    ),
    Row("trl-group-mean-shrinks", "trl", "beta=0.1 kl=k1@reward", ("beta=0.1 kl=k1@advantage", "rloo kl=k1@reward")),
    Row("trl-gmpo-has-its-own-kl", "trl", "GMPOConfig(beta=0.1)", ("GRPOConfig(beta=0.1)", "GMPOConfig(beta=0.0)")),
    Row("k3-is-forward-kl", "trl", "GMPOConfig(beta=0.1)", ("GRPOConfig(beta=0.1)",)),
    Row("refused", "trl", "GMPOConfig(beta=0.1, kl='default')", ("GRPOConfig(beta=0.1, kl='default')",)),
    Row(
        "trl-other-trainer", "trl", "trl dpo --beta 0.1", ("trl grpo --beta 0.1", "kl-plugins run trl rloo", "beta=0.1")
    ),
    Row(
        "trl-spec-without-kl-plugins",
        "trl",
        "trl grpo --beta 0.1 --kl default",
        ("kl-plugins run trl grpo --beta 0.1 --kl default", "beta=0.1 kl=default", "trl grpo --beta 0.1"),
    ),
    Row(
        "trl-spec-without-kl-plugins",
        "trl",
        "from trl import GRPOConfig\nGRPOConfig(beta=0.1, kl='default')",
        ("from kl_plugins.adapters.trl import GRPOConfig\nGRPOConfig(beta=0.1, kl='default')",),
    ),
    Row(
        "verl-group-mean-shrinks",
        "verl",
        REWARD + "algorithm.adv_estimator=grpo actor_rollout_ref.rollout.n=8",
        (REWARD + "algorithm.adv_estimator=grpo", LOSS + "algorithm.adv_estimator=grpo actor_rollout_ref.rollout.n=8"),
    ),
    Row(
        "verl-sessions-drop-the-kl",
        "verl",
        REWARD + "algorithm.adv_estimator=grpo actor_rollout_ref.rollout.multi_turn.enable=True",
        (REWARD + "algorithm.adv_estimator=grpo", REWARD + "actor_rollout_ref.rollout.multi_turn.enable=True"),
        "0.9.1",
    ),
    Row("verl-spec-needs-modules", "verl", LOSS + f"{V}kl_loss_type=default", (LOSS,), "0.8.0"),
]

K = "--algo.kl."
IN_LOSS = f"{K}use_loss {K}estimator k2 "
FEW = "--rollout.batch_size 128 "

ROWS += [
    Row("k1-in-loss", "openrlhf", f"{K}use_loss", (f"{K}use_loss {K}unbiased_gradient", "", IN_LOSS)),
    Row("score-of-another-estimator", "openrlhf", f"{K}estimator k3", (f"{K}estimator k1", IN_LOSS)),
    Row(
        "k3-is-forward-kl",
        "openrlhf",
        f"{K}use_loss {K}estimator k3",
        (IN_LOSS, f"{K}use_loss {K}estimator k3 {K}unbiased_gradient"),
    ),
    Row("no-weight-on-stale-data", "openrlhf", IN_LOSS, (IN_LOSS + FEW, IN_LOSS + f"{K}unbiased_gradient")),
    Row("no-weight-on-stale-data", "openrlhf", IN_LOSS + FEW + "--train.async_enable", (IN_LOSS + FEW,)),
    Row(
        "weight-without-floor-on-stale-data",
        "openrlhf",
        IN_LOSS + f"{K}unbiased_gradient",
        (IN_LOSS + FEW + f"{K}unbiased_gradient", f"{K}use_loss {K}estimator default"),
    ),
    Row("truncated-sampling", "openrlhf", IN_LOSS + "--rollout.top_p 0.9", (IN_LOSS,)),
    Row("foreign-setting", "openrlhf", "--algo.kl.coef 0.1", (IN_LOSS,)),
    Row("negative-beta", "openrlhf", IN_LOSS + f"{K}init_coef -0.1", (IN_LOSS,)),
    Row("observed", "openrlhf", f"{K}estimator k1/observe", (f"{K}estimator k1",)),
    Row(
        "refused",
        "openrlhf",
        f"{K}estimator k3/observe:exact@loss/top",
        (f"{K}estimator k3/observe:exact@loss/top {K}use_loss",),
    ),
    Row("refused", "openrlhf", f"{K}estimator k4/observe", (f"{K}estimator k2/observe {K}use_loss",)),
    Row("refused", "openrlhf", f"{K}estimator observe {K}init_coef 0", (f"{K}estimator observe",)),
    Row("refused", "openrlhf", f"{K}estimator default", (f"{K}use_loss {K}estimator default",)),
    Row("refused", "openrlhf", f"{K}use_loss {K}estimator k1@advantage", (f"{K}estimator k1@advantage",)),
    Row("openrlhf-no-kl", "openrlhf", f"{K}init_coef 0", (IN_LOSS,)),
    Row(
        "openrlhf-ignored-without-coefficient", "openrlhf", f"{K}init_coef 0 {K}use_loss", (f"{K}init_coef 0", IN_LOSS)
    ),
    Row("openrlhf-loss-empties-reward", "openrlhf", IN_LOSS, ("", f"{K}use_loss {K}estimator default")),
    Row(
        "openrlhf-dead-tokens",
        "openrlhf",
        IN_LOSS,
        (IN_LOSS + f"{K}unbiased_gradient", f"{K}estimator k2", f"{K}use_loss {K}estimator k2@loss"),
    ),
    Row(
        "openrlhf-unbiased-in-reward",
        "openrlhf",
        f"{K}unbiased_gradient",
        (IN_LOSS + f"{K}unbiased_gradient",),
        "0.11.2",
    ),
    Row("openrlhf-no-unbiased-yet", "openrlhf", IN_LOSS + f"{K}unbiased_gradient", (IN_LOSS,), "0.11.0"),
    Row(
        "openrlhf-unbiased-hides-the-sampler",
        "openrlhf",
        IN_LOSS + f"{K}unbiased_gradient --train.async_enable",
        (IN_LOSS + f"{K}unbiased_gradient", IN_LOSS + "--train.async_enable"),
    ),
    Row(
        "openrlhf-unbiased-hides-the-sampler",
        "openrlhf",
        IN_LOSS + f"{K}unbiased_gradient --algo.advantage.is_correction_level token",
        (IN_LOSS + f"{K}unbiased_gradient",),
    ),
    Row(
        "openrlhf-correction-spares-the-kl",
        "openrlhf",
        IN_LOSS + "--algo.advantage.is_correction_level token",
        (IN_LOSS, "--algo.advantage.is_correction_level token"),
    ),
    Row(
        "openrlhf-always-token-mean",
        "openrlhf",
        IN_LOSS + "--actor.loss_agg_mode seq-mean-token-mean",
        (IN_LOSS, "--actor.loss_agg_mode seq-mean-token-mean"),
    ),
    Row("openrlhf-engine-mismatch", "openrlhf", IN_LOSS, ("", IN_LOSS + "--algo.advantage.is_correction_level token")),
    Row("openrlhf-k3-overflow", "openrlhf", f"{K}use_loss {K}estimator k3", (IN_LOSS, f"{K}estimator k3"), "0.11.1"),
    Row("openrlhf-always-token-mean", "openrlhf", IN_LOSS + "--actor.policy_loss_type gspo", (IN_LOSS,)),
    Row("openrlhf-mean-by-micro-batch", "openrlhf", IN_LOSS, ("",), "0.10.3"),
    Row("openrlhf-adaptive", "openrlhf", f"{K}target 0.1", ("",)),
    Row(
        "openrlhf-adaptive-sees-too-little",
        "openrlhf",
        IN_LOSS + f"{K}target 0.1 --train.dynamic_batch_enable",
        (IN_LOSS + f"{K}target 0.1", IN_LOSS + "--train.dynamic_batch_enable"),
        "0.11.2",
    ),
    Row(
        "openrlhf-whitened",
        "openrlhf",
        "--algo.advantage.estimator gae",
        ("--algo.advantage.estimator gae --algo.advantage.no_std_norm", "--algo.advantage.estimator rloo", IN_LOSS),
    ),
    Row(
        "openrlhf-k1-reward-to-go",
        "openrlhf",
        "--algo.advantage.estimator rloo",
        ("--algo.advantage.estimator gae", IN_LOSS),
    ),
    Row(
        "openrlhf-score-on-sequence-ratio",
        "openrlhf",
        "--actor.policy_loss_type gspo",
        (IN_LOSS + "--actor.policy_loss_type gspo", ""),
    ),
    Row("openrlhf-flat-flags", "openrlhf", "--use_kl_loss --init_kl_coef 0.1 --kl_estimator k3", (IN_LOSS,), "0.11.2"),
    Row(
        "openrlhf-correction-renamed",
        "openrlhf",
        "--algo.advantage.is_correction_enable",
        ("--algo.advantage.is_correction_level token",),
        "0.11.2",
    ),
    Row(
        "openrlhf-spec-without-kl-plugins",
        "openrlhf",
        f"python -m openrlhf.cli.train_ppo_ray {K}use_loss {K}estimator default",
        (
            f"kl-plugins run openrlhf.cli.train_ppo_ray {K}use_loss {K}estimator default",
            f"python -m openrlhf.cli.train_ppo_ray {IN_LOSS}",
        ),
    ),
    Row(
        "openrlhf-agent-gives-the-logprobs",
        "openrlhf",
        f"{K}use_loss {K}estimator k2@loss/is:token/behaviour:sampler --train.agent_func_path a.py",
        (
            f"{K}use_loss {K}estimator default --train.agent_func_path a.py",
            f"{K}use_loss {K}estimator k2@loss/is:token/behaviour:sampler",
        ),
    ),
    Row("openrlhf-unknown-estimator", "openrlhf", f"{K}estimator k4", (IN_LOSS, f"{K}use_loss {K}estimator default")),
]


def hosts() -> dict[str, Host]:
    """Return the hosts whose configs can be explained, by name."""
    return {name: host for name, host in discover_hosts().hosts.items() if host.explainer}


def explained(host: str, words: str, version: str = "") -> ConfigExplanation:
    """Explain a config that is given as one text."""
    descriptor = hosts()[host]
    module = importlib.import_module(descriptor.explainer)
    given = [words] if "(" in words else words.split()
    explanation: ConfigExplanation = module.explain_config(given, version or descriptor.tested[-1], "given")
    return explanation


def found(host: str, words: str, version: str = "") -> dict[str, ConfigFinding]:
    """Return the findings about a config, by the name of their rule."""
    return {finding.rule: finding for finding in explained(host, words, version).findings}


def rules(host: str) -> list[Any]:
    """Return the rules about one host, without those of all hosts."""
    return list(importlib.import_module(f"{hosts()[host].explainer}.rules").RULES)
