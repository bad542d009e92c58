"""Rules about veRL configs: defects and surprises of veRL's KL, each with its source and version range."""

from __future__ import annotations

from kl_plugins.adapters.explained.rules import Rule
from kl_plugins.adapters.explained.run import Term
from kl_plugins.adapters.verl import ENTRY, LOSS_BETA, LOSS_KEY, MODULES, SCORE_BETA, SCORE_KEY
from kl_plugins.adapters.verl.explained import USE_LOSS, USE_REWARD, VerlRun
from kl_plugins.adapters.verl.explained.defaults import (
    ACTOR,
    ALGORITHM,
    CORRECTION,
    ESTIMATORS,
    MODEL,
    ROLLOUT,
    TRAINER,
)
from kl_plugins.adapters.verl.explained.defaults import RULES as MODES
from kl_plugins.adapters.verl.refusals import WITHOUT_KL
from kl_plugins.spec import looks_like_spec

VERL = ("verl",)
LOSS, KL, REWARD = "losses.ppo_loss", "core_algos.kl_penalty_forward", "ray_trainer.apply_kl_penalty"
GROUPED = ("grpo", "grpo_vectorized")


def _in_loss(run: VerlRun) -> bool:
    return any(term.in_loss and term.native for term in run.terms)


def _in_reward(run: VerlRun) -> bool:
    return any(not term.in_loss and term.native for term in run.terms)


def _scored(run: VerlRun) -> bool:
    """Whether a KL goes through veRL's rewards, its own or that of a @reward spec."""
    return any(term.spec.placement == "reward" for term in run.terms)


def _clamped(term: Term) -> bool:
    return term.in_loss and bool(term.clamp)


def _word(run: VerlRun, key: str) -> str:
    """Return the estimator's name without the plus sign, or nothing for a spec."""
    text = run.text(key)
    return "" if looks_like_spec(text) else text.removesuffix("+")


def _unknown_types(run: VerlRun) -> list[str]:
    switches = ((USE_LOSS, LOSS_KEY), (USE_REWARD, SCORE_KEY))
    return [key for switch, key in switches if run.flag(switch) and (_word(run, key) or "k1") not in ESTIMATORS]


def _plus_keys(run: VerlRun) -> list[str]:
    switches = ((USE_LOSS, LOSS_KEY), (USE_REWARD, SCORE_KEY))
    return [key for switch, key in switches if run.flag(switch) and run.text(key).endswith("+")]


def _idle_loss_keys(run: VerlRun) -> list[str]:
    """Settings of the KL loss that ask for something while it is off."""
    if run.flag(USE_LOSS):
        return []
    found = [LOSS_KEY] if run.chosen(LOSS_KEY) and not looks_like_spec(run.text(LOSS_KEY)) else []
    return found + ([LOSS_BETA] if run.chosen(LOSS_BETA) and run.number(LOSS_BETA) != 0 else [])


def _idle_reward_keys(run: VerlRun) -> list[str]:
    """Settings of the KL in the reward that ask for something while it is off."""
    if run.flag(USE_REWARD):
        return []
    found = [SCORE_KEY] if run.chosen(SCORE_KEY) and not looks_like_spec(run.text(SCORE_KEY)) else []
    return found + ([SCORE_BETA] if run.chosen(SCORE_BETA) and run.number(SCORE_BETA) != 0 else [])


def _zero_betas(run: VerlRun) -> list[str]:
    found = [LOSS_BETA] if run.flag(USE_LOSS) and run.number(LOSS_BETA) == 0 and _word(run, LOSS_KEY) else []
    return found + (
        [SCORE_BETA] if run.flag(USE_REWARD) and run.number(SCORE_BETA) == 0 and _word(run, SCORE_KEY) else []
    )


def _adaptive(run: VerlRun) -> bool:
    return run.text(f"{ALGORITHM}kl_ctrl.type") == "adaptive"


def _corrections(run: VerlRun) -> list[str]:
    return [key for key in (f"{CORRECTION}rollout_is", f"{CORRECTION}rollout_rs") if run.text(key)]


def _lora(run: VerlRun) -> bool:
    return run.number(f"{MODEL}lora_rank") > 0 or bool(run.text(f"{MODEL}lora_adapter_path"))


RULES: tuple[Rule[VerlRun], ...] = (
    Rule(
        "verl-no-kl",
        VERL,
        "note",
        (USE_LOSS, USE_REWARD),
        lambda run: not run.flag(USE_LOSS) and not run.flag(USE_REWARD),
        "both switches are off, so there is no KL term and no reference model",
        "trainer/ppo/utils.need_reference_policy; both are off by default",
        "set one of them, if the policy is to stay near its start",
    ),
    Rule(
        "verl-loss-settings-ignored",
        VERL,
        "warning",
        lambda run: (*_idle_loss_keys(run), USE_LOSS),
        lambda run: bool(_idle_loss_keys(run)),
        "these settings have no effect, because use_kl_loss is off",
        f"{LOSS}; verl#3276",
        "set use_kl_loss to True, or remove them",
        ignored=_idle_loss_keys,
    ),
    Rule(
        "verl-reward-settings-ignored",
        VERL,
        "warning",
        lambda run: (*_idle_reward_keys(run), USE_REWARD),
        lambda run: bool(_idle_reward_keys(run)),
        "these settings have no effect, because use_kl_in_reward is off",
        f"{REWARD}; verl#3276",
        "set use_kl_in_reward to True, or remove them",
        ignored=_idle_reward_keys,
    ),
    Rule(
        "verl-zero-coefficient",
        VERL,
        "warning",
        _zero_betas,
        lambda run: bool(_zero_betas(run)),
        "the switch is on and the coefficient is 0: veRL runs the reference model, and nothing is regularised",
        "trainer/ppo/utils.need_reference_policy",
        "set the coefficient, or switch the KL off, which saves the reference model",
    ),
    Rule(
        "verl-both-placements",
        VERL,
        "warning",
        (USE_LOSS, USE_REWARD),
        lambda run: _in_loss(run) and _in_reward(run),
        "both switches are on, so the KL is applied twice, with two coefficients and as two different gradients",
        f"{LOSS} and {REWARD}; verl#3276, verl#265",
        "switch one of them off",
    ),
    Rule(
        "verl-unknown-estimator",
        VERL,
        "error",
        _unknown_types,
        lambda run: bool(_unknown_types(run)),
        "veRL has no such estimator. It does not check the name before training: the first update fails, after a whole "
        "rollout. (`full` is in veRL's documentation, and raises NotImplementedError)",
        KL,
        "use one of kl, abs, mse, low_var_kl, with or without +, or a spec",
    ),
    Rule(
        "verl-plus-fails",
        VERL,
        "error",
        _plus_keys,
        lambda run: bool(_plus_keys(run)),
        "before veRL 0.8 an estimator with + raises NotImplementedError, because the suffix is not removed",
        "core_algos.kl_penalty in veRL 0.6.0 to 0.7.1",
        "use veRL 0.8 or newer, or mse, which has the same gradient",
        versions="<0.8",
    ),
    Rule(
        "verl-k3-clamp",
        VERL,
        "warning",
        (LOSS_KEY,),
        lambda run: any(_clamped(term) for term in run.terms),
        "the clamp of k3 takes the gradient of a token away where the reference is more than 13.6 times as probable as "
        "the policy (log-ratio below -2.61, or above 11): with a far reference, 5 of 43 tokens had none",
        f"{KL}; verl#891, verl#751, verl#2928; docs: Migration",
        "use mse or low_var_kl+, or the spec `default`",
    ),
    Rule(
        "verl-weights-spare-the-kl",
        VERL,
        "warning",
        (f"{CORRECTION}rollout_is", LOSS_KEY),
        lambda run: _in_loss(run) and bool(run.text(f"{CORRECTION}rollout_is")),
        "veRL's rollout weights multiply the policy loss alone. The KL in the loss stays without a weight",
        f"{LOSS}; verl#2983, verl#1124",
        "use the spec k2@loss/is:token/behaviour:sampler/floor:0.5, with rollout.calculate_log_probs=True",
    ),
    Rule(
        "verl-engine-mismatch",
        VERL,
        "note",
        (f"{ROLLOUT}name", LOSS_KEY),
        lambda run: _in_loss(run) and not run.text(f"{CORRECTION}rollout_is"),
        "another engine than the trainer samples the tokens, and nothing in the KL corrects for the difference of "
        "their probabilities",
        f"{LOSS}: rollout_log_probs is not selected; verl#2953, verl#6780",
        "use the spec k2@loss/is:token/behaviour:sampler/floor:0.5, with rollout.calculate_log_probs=True",
    ),
    Rule(
        "verl-rejection-shrinks-the-kl",
        VERL,
        "warning",
        (f"{CORRECTION}rollout_rs", f"{ACTOR}loss_agg_mode"),
        lambda run: (
            any(term.in_loss for term in run.terms)
            and bool(run.text(f"{CORRECTION}rollout_rs"))
            and run.text(f"{ACTOR}loss_agg_mode") == "token-mean"
        ),
        "rejected tokens have no KL, and the mean is still divided by all response tokens, so the KL becomes weaker as "
        "more tokens are rejected",
        "engine/fsdp/transformer_impl (batch_num_tokens from loss_mask); verl#4852",
        "watch the share of rejected tokens, and raise beta by it",
    ),
    Rule(
        "verl-kl-of-the-engine",
        VERL,
        "warning",
        (f"{CORRECTION}bypass_mode", USE_REWARD),
        lambda run: _in_reward(run) and run.flag(f"{CORRECTION}bypass_mode"),
        "bypass_mode puts the engine's log-probs in the place of the trainer's, so the KL in the reward contains the "
        "mismatch of engine and trainer",
        "trainer_base (bypass_mode); verl#4912, verl#4272",
        "set bypass_mode to False, or use the KL in the loss",
    ),
    Rule(
        "verl-bypass-drops-the-correction",
        VERL,
        "warning",
        lambda run: (*_corrections(run), f"{CORRECTION}bypass_mode"),
        lambda run: (
            bool(_corrections(run))
            and run.flag(f"{CORRECTION}bypass_mode")
            and run.flag(f"{TRAINER}use_v1")
            and run.text(f"{ACTOR}policy_loss.loss_mode") != "bypass_mode"
        ),
        "the v1 trainers take the engine's log-probs as the old ones under bypass_mode and do nothing more: rollout_is "
        "and rollout_rs have no effect, neither on the policy loss nor on the KL",
        "trainer_base._compute_old_log_prob (only the older trainer calls apply_bypass_mode); verl#4912, verl#4272",
        "set bypass_mode to False, or trainer.use_v1 to False",
        versions=">=0.9",
        ignored=_corrections,
    ),
    Rule(
        "verl-reward-divided-by-std",
        VERL,
        "warning",
        (f"{ALGORITHM}norm_adv_by_std_in_grpo", f"{ALGORITHM}adv_estimator", USE_REWARD),
        lambda run: _scored(run) and run.algorithm in GROUPED and run.flag(f"{ALGORITHM}norm_adv_by_std_in_grpo"),
        "GRPO divides rewards, the KL in them included, by the group's standard deviation. Where the task rewards of a "
        "group tie, what remains is the KL divided by its own deviation, whatever beta is",
        "core_algos.compute_grpo_outcome_advantage; arXiv 2601.10201",
        "use the spec k1@advantage, which is subtracted afterwards, or the KL in the loss",
    ),
    Rule(
        "verl-estimator-drops-the-kl",
        VERL,
        "error",
        (f"{ALGORITHM}adv_estimator", USE_REWARD),
        lambda run: _in_reward(run) and run.algorithm in WITHOUT_KL,
        lambda run: f"a KL in the reward has no effect under {run.algorithm}: {WITHOUT_KL[run.algorithm]}",
        "core_algos.compute_gdpo_outcome_advantage, core_algos.compute_grpo_passk_outcome_advantage",
        "use the KL in the loss",
    ),
    Rule(
        "verl-adaptive-not-saved",
        VERL,
        "warning",
        (f"{ALGORITHM}kl_ctrl.type",),
        lambda run: _in_reward(run) and _adaptive(run),
        "the adaptive controller keeps its beta in memory alone, so it starts again when a run resumes",
        "core_algos.AdaptiveKLController; verl#2653, verl#7013",
        "use a spec: its controller is in the checkpoints",
    ),
    Rule(
        "verl-adaptive-ignored",
        VERL,
        "warning",
        (f"{ALGORITHM}kl_ctrl.type", USE_REWARD),
        lambda run: _adaptive(run) and not run.flag(USE_REWARD),
        "kl_ctrl controls the KL in the reward alone, which is off. The coefficient of the KL loss does not change",
        f"{REWARD}; {LOSS}",
        "use a spec with beta:adaptive in kl_loss_type",
        ignored=lambda run: (f"{ALGORITHM}kl_ctrl.type",),
    ),
    Rule(
        "verl-mean-by-micro-batch",
        VERL,
        "warning",
        (f"{ACTOR}loss_agg_mode", f"{ACTOR}loss_scale_factor"),
        lambda run: any(term.rule == "longest" for term in run.terms),
        "each micro-batch is divided by the length of its own longest response, so the strength of the KL depends on "
        "how responses are put into micro-batches",
        "core_algos.agg_loss",
        "set actor_rollout_ref.actor.loss_scale_factor to data.max_response_length",
    ),
    Rule(
        "verl-sum-of-tokens",
        VERL,
        "warning",
        (f"{ACTOR}loss_agg_mode", LOSS_BETA),
        lambda run: any(term.rule == "responses" for term in run.terms),
        "the KL of a response is a sum over its tokens: with responses of 200 tokens, beta is 200 times as strong as "
        "under token-mean",
        "core_algos.agg_loss; docs: Migration",
        "divide beta by the mean length of a response (--suggest has the number)",
    ),
    Rule(
        "verl-unknown-aggregation",
        VERL,
        "error",
        (f"{ACTOR}loss_agg_mode",),
        lambda run: run.text(f"{ACTOR}loss_agg_mode") not in MODES,
        "veRL has no such loss_agg_mode",
        "core_algos.agg_loss",
        f"use one of {', '.join(MODES)}",
    ),
    Rule(
        "verl-ppo-kl-is-another",
        VERL,
        "note",
        (f"{ACTOR}policy_loss.ppo_kl_coef", f"{ACTOR}policy_loss.loss_mode"),
        lambda run: run.chosen(f"{ACTOR}policy_loss.ppo_kl_coef"),
        "ppo_kl_coef is of the kl-cov policy loss, and its KL is to the old policy. It does not hold the policy near a "
        "reference",
        "core_algos.compute_policy_loss_kl_cov",
    ),
    Rule(
        "verl-raw-logprobs",
        VERL,
        "warning",
        (f"{ROLLOUT}logprobs_mode",),
        lambda run: (
            bool(run.terms)
            and run.sampling.raw
            and (run.sampling.truncated or run.sampling.penalised or run.sampling.temperature != 1)
        ),
        "the engine reports log-probs of another distribution than the one that it samples from, so every weight "
        "against it is wrong",
        "rollout.logprobs_mode; vllm#42259",
        "set actor_rollout_ref.rollout.logprobs_mode=processed_logprobs",
    ),
    Rule(
        "verl-lora-reference",
        VERL,
        "note",
        (f"{MODEL}lora_rank", f"{MODEL}lora_adapter_path"),
        lambda run: bool(run.terms) and _lora(run),
        "the reference is the base model with the adapter switched off, also if training starts from an adapter",
        "workers/engine_workers (ref_in_actor); trl#3194 has the same question",
        "merge an earlier adapter into the base model first",
    ),
    Rule(
        "verl-group-mean-shrinks",
        VERL,
        "note",
        (f"{ROLLOUT}n", USE_REWARD),
        lambda run: _scored(run) and run.algorithm in GROUPED and run.number(f"{ROLLOUT}n") > 1,
        lambda run: (
            "the mean that is subtracted from a group's rewards contains each response's own KL, so the gradient "
            f"of the KL is multiplied by 1 - 1/{run.number(f'{ROLLOUT}n'):g}"
        ),
        "core_algos.compute_grpo_outcome_advantage; theory: Tokens and sequences",
    ),
    Rule(
        "verl-sessions-drop-the-kl",
        VERL,
        "warning",
        (f"{ROLLOUT}multi_turn.enable", USE_REWARD),
        lambda run: _scored(run) and run.algorithm in GROUPED and run.flag(f"{ROLLOUT}multi_turn.enable"),
        "if the agent loop gives several outputs per session, the advantages of a session come from its last output "
        "alone, and the KL in the reward of the others is dropped",
        "trainer/ppo/v1/utils.compute_advantage of sessions",
        "use the KL in the loss, or an agent loop with one output per session",
        versions=">=0.9",
    ),
    Rule(
        "verl-spec-needs-modules",
        VERL,
        "warning",
        lambda run: [key for key in (LOSS_KEY, SCORE_KEY) if looks_like_spec(run.text(key))],
        lambda run: any(looks_like_spec(run.text(key)) for key in (LOSS_KEY, SCORE_KEY)),
        "veRL before 0.9 does not find kl-plugins by itself, and the spec is then an unknown estimator that fails at "
        "the first update",
        "veRL 0.9 has entry points for plugins",
        f"set {MODULES}={ENTRY} in every process, on every node",
        versions="<0.9",
    ),
    Rule(
        "verl-k1-reward-in-groups",
        VERL,
        "note",
        (SCORE_KEY, f"{ALGORITHM}adv_estimator"),
        lambda run: _scored(run) and run.algorithm in GROUPED,
        "the KL of the whole response is subtracted from its reward, and every token gets the same share of it. That "
        "is the sequence KL, with more variance than the KL of the tokens that follow",
        f"{REWARD}, core_algos.compute_grpo_outcome_advantage; arXiv 2601.10201",
        "the spec k1@advantage gives each token the KL of the tokens that follow",
    ),
)
"""The rules about veRL."""
