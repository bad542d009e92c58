"""Rules about OpenRLHF command lines: defects and surprises of its KL, each with its source and version range."""

from __future__ import annotations

from kl_plugins.adapters.explained.rules import Rule
from kl_plugins.adapters.openrlhf.explained import COEFFICIENT, ESTIMATOR, USE_LOSS, OpenRLHFRun
from kl_plugins.adapters.openrlhf.explained.defaults import ADVANTAGE, FLAT, KL
from kl_plugins.spec import looks_like_spec

OPENRLHF = ("openrlhf",)
APPROX, STEP = "models.utils.compute_approx_kl", "ActorPPOTrainer.training_step"
MAKER = "RemoteExperienceMaker.make_experience"
NATIVE = ("k1", "k2", "k3")
LEVEL, ENABLE = f"{ADVANTAGE}is_correction_level", f"{ADVANTAGE}is_correction_enable"
UNBIASED, TARGET = f"{KL}unbiased_gradient", f"{KL}target"
WHITENED = ("gae", "reinforce", "reinforce_baseline")


def _native_loss(run: OpenRLHFRun) -> bool:
    return any(term.native and term.in_loss for term in run.terms)


def _native_score(run: OpenRLHFRun) -> bool:
    return any(term.native and not term.in_loss for term in run.terms)


def _dead(run: OpenRLHFRun) -> bool:
    return any(
        term.native and term.in_loss and term.clamp and term.spec.estimator in ("k2", "k3") for term in run.terms
    )


def _stock_program(run: OpenRLHFRun) -> bool:
    words = " ".join(run.settings.words)
    return "openrlhf" in words and "kl-plugins" not in words and "kl_plugins" not in words


def _idle(run: OpenRLHFRun) -> list[str]:
    """Flags that need a reference, in a run that has none."""
    return [key for key in (USE_LOSS, ESTIMATOR, UNBIASED, TARGET) if run.given(key)]


def _new_names(run: OpenRLHFRun) -> list[str]:
    return [FLAT[key] for key in run.flat]


def _correction_keys(run: OpenRLHFRun) -> list[str]:
    return [key for key in (LEVEL, ENABLE) if key in run.defaults]


RULES: tuple[Rule[OpenRLHFRun], ...] = (
    Rule(
        "openrlhf-no-kl",
        OPENRLHF,
        "note",
        (COEFFICIENT,),
        lambda run: run.number(COEFFICIENT) == 0,
        "the coefficient is 0, so there is no KL term, and OpenRLHF loads no reference model",
        "cli.train_ppo_ray: the reference exists where init_coef is above 0",
        "set --algo.kl.init_coef, if the policy is to stay near its start",
    ),
    Rule(
        "openrlhf-ignored-without-coefficient",
        OPENRLHF,
        "warning",
        lambda run: (*_idle(run), COEFFICIENT),
        lambda run: run.number(COEFFICIENT) == 0 and bool(_idle(run)),
        "these flags have no effect, because the coefficient is 0",
        "cli.train_ppo_ray; OpenRLHF#773",
        "set --algo.kl.init_coef, or drop them",
        ignored=_idle,
    ),
    Rule(
        "openrlhf-loss-empties-reward",
        OPENRLHF,
        "note",
        (USE_LOSS,),
        _native_loss,
        "with use_loss the KL is in the loss alone: the KL in the reward, and the metric of rollouts, are 0",
        f"{MAKER}; OpenRLHF#768, OpenRLHF#777",
    ),
    Rule(
        "openrlhf-dead-tokens",
        OPENRLHF,
        "warning",
        (ESTIMATOR,),
        _dead,
        lambda run: run.terms[0].clamp,
        f"{APPROX}, since 0.8.6; OpenRLHF#525, OpenRLHF#1120; docs: Migration",
        "add --algo.kl.unbiased_gradient (0.11.1 or newer), or use the spec `default`",
    ),
    Rule(
        "openrlhf-unbiased-in-reward",
        OPENRLHF,
        "warning",
        (UNBIASED, USE_LOSS),
        lambda run: run.flag(UNBIASED) and not run.as_loss and bool(run.terms),
        "unbiased_gradient belongs to the KL in the loss. The KL in the reward is not differentiated, and the flag has "
        "no effect",
        f"{MAKER} does not pass it on",
        "drop it, or add --algo.kl.use_loss",
        versions=">=0.11.1",
        ignored=lambda run: (UNBIASED,),
    ),
    Rule(
        "openrlhf-no-unbiased-yet",
        OPENRLHF,
        "error",
        (UNBIASED,),
        lambda run: run.given(UNBIASED),
        "this version has no such flag, and its parser stops",
        "OpenRLHF#1309, released in 0.11.1",
        "use OpenRLHF 0.11.1 or newer, or the spec k2@loss/is:token/cap:10/behaviour:old",
        versions="<0.11.1",
    ),
    Rule(
        "openrlhf-unbiased-hides-the-sampler",
        OPENRLHF,
        "warning",
        (UNBIASED,),
        lambda run: run.unbiased and bool(run.terms) and (run.staleness.asynchronous or run.corrects),
        "the weight divides by log-probs that the trainer recomputes, and not by those of vLLM that the tokens were "
        "drawn with, so neither the lag of asynchronous rollouts nor the mismatch of the engine is in it",
        f"{STEP}: log_probs_old=experience.action_log_probs; OpenRLHF#529; radixark/miles#1829",
        "use the spec k2@loss/is:token/behaviour:sampler/floor:0.5",
        versions=">=0.11.1",
    ),
    Rule(
        "openrlhf-correction-spares-the-kl",
        OPENRLHF,
        "warning",
        lambda run: (*_correction_keys(run), ESTIMATOR),
        lambda run: _native_loss(run) and run.corrects,
        "OpenRLHF's importance sampling correction multiplies the policy loss alone, and not the KL in the loss",
        f"models.loss.PolicyLoss; {STEP}; OpenRLHF#1098",
        "use the spec k2@loss/is:token/behaviour:sampler/floor:0.5",
    ),
    Rule(
        "openrlhf-engine-mismatch",
        OPENRLHF,
        "note",
        (ESTIMATOR,),
        lambda run: _native_loss(run) and not run.corrects,
        "vLLM samples the tokens, and nothing in the KL corrects for the difference between its probabilities and the "
        "trainer's",
        f"{STEP}: rollout_log_probs does not reach the KL; OpenRLHF#1098",
        "use the spec k2@loss/is:token/behaviour:sampler/floor:0.5",
    ),
    Rule(
        "openrlhf-k3-overflow",
        OPENRLHF,
        "warning",
        (ESTIMATOR,),
        lambda run: _native_loss(run) and run.text(ESTIMATOR) == "k3",
        "before 0.11.2 the exp in k3 is not bounded: it overflows on a token that the policy has nearly dropped, and "
        "the clamp after it then gives a gradient of NaN",
        f"{APPROX} before 0.11.2; OpenRLHF#525, OpenRLHF#1120, OpenRLHF#1160, OpenRLHF#1335",
        "use OpenRLHF 0.11.2, or a spec",
        versions="<0.11.2",
    ),
    Rule(
        "openrlhf-always-token-mean",
        OPENRLHF,
        "note",
        ("actor.loss_agg_mode", "actor.policy_loss_type"),
        lambda run: (
            any(term.in_loss for term in run.terms)
            and (
                run.text("actor.loss_agg_mode") == "seq-mean-token-mean" or run.text("actor.policy_loss_type") == "gspo"
            )
        ),
        "the KL loss is a mean over tokens, although the policy loss is a mean over responses, so beta has another "
        "weight against the policy loss for long responses",
        STEP,
    ),
    Rule(
        "openrlhf-mean-by-micro-batch",
        OPENRLHF,
        "warning",
        (ESTIMATOR,),
        lambda run: any(term.in_loss for term in run.terms),
        "this version averages the KL over each micro-batch first, so a token counts more in a micro-batch with few "
        "tokens",
        f"{STEP} before 0.10.4",
        "use OpenRLHF 0.10.4 or newer",
        versions="<0.10.4",
    ),
    Rule(
        "openrlhf-adaptive",
        OPENRLHF,
        "warning",
        (TARGET,),
        lambda run: bool(run.terms) and bool(run.value(TARGET)),
        "OpenRLHF's own code says that its adaptive controller is incompatible here. Its beta is kept in memory alone, "
        "and starts again when a run resumes",
        "PPOTrainer.train_step (TODO); kl_controller.AdaptiveKLController; OpenRLHF#1289",
        "use a spec with beta:adaptive, whose controller is in the checkpoints",
    ),
    Rule(
        "openrlhf-adaptive-sees-too-little",
        OPENRLHF,
        "error",
        (TARGET, "train.dynamic_batch_enable"),
        lambda run: _native_loss(run) and bool(run.value(TARGET)) and run.flag("train.dynamic_batch_enable"),
        "with dynamic batches the controller sees the KL divided by about the number of micro-batches, so it lowers "
        "beta although the KL is above the target",
        "ppo_utils.replay_buffer (line 171 in 0.11.2)",
        "use a spec: kl-plugins gives the controller the mean over all tokens",
        versions="<=0.11.2",
    ),
    Rule(
        "openrlhf-whitened",
        OPENRLHF,
        "note",
        (f"{ADVANTAGE}estimator", f"{ADVANTAGE}no_std_norm"),
        lambda run: (
            any(term.spec.placement == "reward" for term in run.terms)
            and run.algorithm in WHITENED
            and not run.flag(f"{ADVANTAGE}no_std_norm")
        ),
        "advantages, which hold the KL, are divided by their standard deviation over the batch, so the strength of the "
        "KL depends on the spread of the rewards as well as on beta",
        "RemoteExperienceMaker.compute_advantages_and_returns",
        "use the spec k1@advantage, which is subtracted afterwards",
    ),
    Rule(
        "openrlhf-k1-reward-to-go",
        OPENRLHF,
        "note",
        (ESTIMATOR, f"{ADVANTAGE}estimator"),
        lambda run: _native_score(run) and run.text(ESTIMATOR) == "k1" and run.algorithm not in ("gae",),
        "each token's return holds the KL of the tokens that follow, and the baseline holds none of it: on fresh data "
        "that is the gradient of the sequence KL. The same beta in TRL or veRL means another KL in the reward",
        f"{MAKER}, models.utils.compute_reward; docs: Migration",
    ),
    Rule(
        "openrlhf-score-on-sequence-ratio",
        OPENRLHF,
        "warning",
        ("actor.policy_loss_type", USE_LOSS),
        lambda run: any(not term.in_loss for term in run.terms) and run.text("actor.policy_loss_type") == "gspo",
        "GSPO multiplies every token's advantage with the ratio of the whole sequence, so the KL of a token acts on "
        "all tokens of its response alike",
        "models.loss.PolicyLoss",
        "use a KL in the loss",
    ),
    Rule(
        "openrlhf-flat-flags",
        OPENRLHF,
        "error",
        _new_names,
        lambda run: bool(run.flat),
        lambda run: (
            f"this version's parser does not know {', '.join('--' + key for key in run.flat)}: flags have dots "
            "since 0.10.2"
        ),
        "cli.train_ppo_ray since 0.10.2",
        "use the names with dots, or assume an older version with --version",
        versions=">=0.10.2",
    ),
    Rule(
        "openrlhf-correction-renamed",
        OPENRLHF,
        "error",
        lambda run: [
            setting.key for setting in run.settings if setting.key in (ENABLE, f"{ADVANTAGE}is_correction_type")
        ],
        lambda run: run.given(ENABLE) or run.given(f"{ADVANTAGE}is_correction_type"),
        "this version's parser does not know these flags",
        "OpenRLHF#1339, released in 0.11.2",
        "use --algo.advantage.is_correction_level, is_correction_mode and is_correction_gating",
        versions=">=0.11.2",
    ),
    Rule(
        "openrlhf-spec-without-kl-plugins",
        OPENRLHF,
        "error",
        (ESTIMATOR,),
        lambda run: looks_like_spec(run.text(ESTIMATOR)) and _stock_program(run),
        "OpenRLHF's own parser does not know specs, and stops",
        "cli.train_ppo_ray",
        "start it by `kl-plugins run openrlhf.cli.train_ppo_ray`",
    ),
    Rule(
        "openrlhf-agent-gives-the-logprobs",
        OPENRLHF,
        "warning",
        ("train.agent_func_path", ESTIMATOR),
        lambda run: bool(run.text("train.agent_func_path")) and any("sampler" in term.weight for term in run.terms),
        "the weight divides by log-probs that the agent returns. An agent of your own may sample with other settings, "
        "return log-probs of another kind, or none",
        "vllm_engine, agent.py: a missing log-prob becomes 0",
        "let the agent return rollout_log_probs of the processed distribution",
    ),
    Rule(
        "openrlhf-unknown-estimator",
        OPENRLHF,
        "error",
        (ESTIMATOR,),
        lambda run: run.text(ESTIMATOR) not in NATIVE and not looks_like_spec(run.text(ESTIMATOR)),
        "OpenRLHF has no such estimator, and its parser stops",
        APPROX,
        "use one of k1, k2, k3, or a spec with kl-plugins run",
    ),
)
"""The rules about OpenRLHF."""
