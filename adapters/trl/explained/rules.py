"""Rules about TRL configs: defects and surprises of TRL's KL, each with its source and version range."""

from __future__ import annotations

import re

from kl_plugins.adapters.explained.rules import Rule
from kl_plugins.adapters.trl.explained import TRLRun
from kl_plugins.adapters.trl.explained.defaults import RULES as MODES

TRL = ("trl",)
LOSS = "GRPOTrainer._compute_loss"


def _native(run: TRLRun) -> bool:
    return any(term.native for term in run.terms)


def _grpo(run: TRLRun) -> bool:
    return run.algorithm in ("GRPO", "GMPO") and _native(run)


def _without_beta(run: TRLRun) -> list[str]:
    """Settings that need a reference, in a run that has none."""
    return [
        key for key in ("use_bias_correction_kl", "ref_model_sync_steps", "ref_model_mixup_alpha") if run.given(key)
    ]


def _no_beta(run: TRLRun) -> bool:
    return run.number("beta") == 0 and run.algorithm in ("GRPO", "RLOO", "GMPO")


def _peft(run: TRLRun) -> bool:
    return run.flag("use_peft") or "peft_config" in run.settings


def _other_temperature(run: TRLRun) -> bool:
    key = "generation_kwargs.temperature"
    return run.given(key) and run.number(key) != run.number("temperature")


def _scored(run: TRLRun) -> bool:
    """Whether a spec puts the KL into GRPO's rewards."""
    return run.algorithm == "GRPO" and any(term.spec.placement == "reward" for term in run.terms)


def _stock_program(run: TRLRun) -> bool:
    """Whether the program that gets the config is one without kl-plugins."""
    words = " ".join(run.settings.words)
    stock = (
        bool(re.search(r"\btrl\b|trl\.scripts\.", words)) and "kl-plugins" not in words and "kl_plugins" not in words
    )
    return stock or ("trl" in run.settings.imports and "kl_plugins" not in run.settings.imports)


def _given_to_async(run: TRLRun) -> list[str]:
    return [key for key in ("beta", "use_bias_correction_kl", "kl", "sync_ref_model") if run.given(key)]


RULES: tuple[Rule[TRLRun], ...] = (
    Rule(
        "trl-beta-is-zero",
        TRL,
        "note",
        ("beta",),
        lambda run: _no_beta(run) and not run.given("kl"),
        "beta is 0, so there is no KL term and TRL loads no reference model",
        "GRPOConfig.beta, 0 by default since TRL 0.19; trl#2806, trl#4040",
        "set beta, if the policy is to stay near its start",
    ),
    Rule(
        "trl-ignored-without-beta",
        TRL,
        "warning",
        _without_beta,
        lambda run: _no_beta(run) and bool(_without_beta(run)),
        "these settings have no effect, because beta is 0",
        f"{LOSS}: the KL is computed only where beta is not 0",
        "set beta, or remove them",
        ignored=_without_beta,
    ),
    Rule(
        "trl-sync-without-reference",
        TRL,
        "error",
        ("sync_ref_model", "beta"),
        lambda run: run.flag("sync_ref_model") and _no_beta(run),
        "there is no reference model to synchronise where beta is 0, so TRL stops with an error",
        "GRPOTrainer.__init__, RLOOTrainer.__init__",
        "set beta, or sync_ref_model to false",
    ),
    Rule(
        "trl-sync-with-peft",
        TRL,
        "error",
        ("sync_ref_model", "use_peft"),
        lambda run: run.flag("sync_ref_model") and not _no_beta(run) and _peft(run),
        "the reference of a PEFT model is its base model, which TRL cannot synchronise: it stops with an error",
        "GRPOTrainer.__init__; trl#6975",
        "set sync_ref_model to false",
    ),
    Rule(
        "trl-sequence-ratio-on-tokens",
        TRL,
        "error",
        ("importance_sampling_level", "use_bias_correction_kl", "beta"),
        lambda run: _grpo(run) and run.by_sequence,
        "one ratio per sequence multiplies the KL of each token, and its gradient goes to all tokens of the response: "
        "the result is the gradient of no divergence. In a measured batch it differed by 0.37 of its size from the "
        "nearest spec",
        f"trl#6586, trl#6594; {LOSS}; docs: Migration",
        "set use_bias_correction_kl to false, or use the spec `default`, which weights each token by its own ratio",
        versions=">=0.26",
    ),
    Rule(
        "trl-default-flipped",
        TRL,
        "note",
        ("use_bias_correction_kl",),
        lambda run: _grpo(run) and run.reweights and not run.given("use_bias_correction_kl"),
        "since TRL 1.10 the weighted KL is the default. In older versions the same config had the gradient of plain "
        "k3, which is the forward KL's, also on fresh data",
        "trl#6503",
        "set it in the config, so that an upgrade does not change the gradient",
        versions=">=1.10",
    ),
    Rule(
        "trl-default-will-flip",
        TRL,
        "note",
        ("use_bias_correction_kl",),
        lambda run: (
            _native(run) and run.algorithm == "GRPO" and not run.reweights and not run.given("use_bias_correction_kl")
        ),
        "from TRL 1.10 on the default is True, so an upgrade changes the KL's gradient, also on fresh data",
        "trl#6503",
        "set it in the config",
        versions=">=0.26,<1.10",
    ),
    Rule(
        "trl-engine-mismatch",
        TRL,
        "warning",
        ("use_vllm", "beta"),
        lambda run: _grpo(run) and run.flag("use_vllm"),
        "vLLM samples the tokens, and its importance weight multiplies the policy loss alone. The KL is added later, "
        "and the KL's own ratio, if it has one, divides by TRL's recomputed log-probs. The mismatch of engine and "
        "trainer stays in the KL",
        f"{LOSS}; trl#3025, trl#3867",
        "use the spec k2@loss/is:token/behaviour:sampler/floor:0.5",
    ),
    Rule(
        "trl-k3-overflow",
        TRL,
        "warning",
        ("beta",),
        _grpo,
        "TRL does not bound the exp in k3: a token that the policy has nearly dropped gives an infinite KL, and NaN "
        "after it (at a log-ratio of -88 in float32, earlier in 16 bits)",
        f"trl#3015, trl#6637; {LOSS}",
        "use a spec: log-ratios are limited inside the exp, and the gradient stays",
    ),
    Rule(
        "trl-masks-spare-the-kl",
        TRL,
        "note",
        lambda run: (
            *(("off_policy_mask_threshold",) if run.value("off_policy_mask_threshold") is not None else ()),
            *(("top_entropy_quantile",) if run.number("top_entropy_quantile") < 1 else ()),
        ),
        lambda run: (
            _grpo(run)
            and (run.value("off_policy_mask_threshold") is not None or run.number("top_entropy_quantile") < 1)
        ),
        "these masks drop the policy loss of some tokens. The KL of the same tokens is added afterwards and stays",
        LOSS,
    ),
    Rule(
        "trl-groups-without-signal",
        TRL,
        "note",
        ("beta",),
        _grpo,
        "a group whose rewards all tie has advantages of 0, but its KL still has a gradient",
        f"trl#5588; {LOSS}",
    ),
    Rule(
        "trl-luspo-sums",
        TRL,
        "warning",
        ("loss_type", "beta"),
        lambda run: _grpo(run) and run.text("loss_type") == "luspo",
        "luspo adds up the tokens of a response: with responses of 200 tokens, beta is 200 times as strong as under "
        "dapo",
        f"{LOSS}; docs: Migration",
        "divide beta by the mean length of a response (--suggest has the number)",
    ),
    Rule(
        "trl-constant-divisor",
        TRL,
        "note",
        ("loss_type", "max_completion_length"),
        lambda run: _grpo(run) and run.text("loss_type") == "dr_grpo",
        "dr_grpo divides by the number of responses times max_completion_length, so beta is weaker than under dapo, by "
        "the ratio of the mean length of a response to that limit, and it changes with the limit",
        f"{LOSS}; docs: Migration",
        "--suggest has the equivalent beta",
    ),
    Rule(
        "trl-luspo-padding",
        TRL,
        "warning",
        ("loss_type",),
        lambda run: run.text("loss_type") == "luspo" and bool(run.terms),
        "luspo averages per-token terms over padding, so tokens of long responses count more",
        f"{LOSS} before TRL 1.10",
        "use TRL 1.10 or another loss_type",
        versions="<1.10",
    ),
    Rule(
        "trl-normaliser-changed",
        TRL,
        "note",
        ("loss_type", "steps_per_generation", "gradient_accumulation_steps"),
        lambda run: (
            run.text("loss_type") in ("dapo", "cispo", "vespo")
            and bool(run.terms)
            and run.config.steps_per_generation != run.config.gradient_accumulation_steps
        ),
        "TRL 1.10 changed the normaliser of this loss by gradient_accumulation_steps / steps_per_generation, so the "
        "same beta and learning rate act differently before and after it",
        "TRL 1.10, loss normalisation of dapo, cispo and vespo",
    ),
    Rule(
        "trl-temperatures-differ",
        TRL,
        "error",
        ("generation_kwargs.temperature", "temperature"),
        lambda run: bool(run.terms) and _other_temperature(run),
        "completions are sampled at another temperature than the one that TRL scores them with, so neither the ratio "
        "nor the KL is that of the policy which is sampled",
        "GRPOTrainer._get_per_token_logps_and_entropies; trl#3029",
        "set temperature, and remove it from generation_kwargs",
    ),
    Rule(
        "trl-lora-reference",
        TRL,
        "note",
        lambda run: ("use_peft" if run.flag("use_peft") else "peft_config",),
        lambda run: bool(run.terms) and _peft(run),
        "the reference is the base model with the new adapter switched off, also if an adapter was trained before",
        "GRPOTrainer.__init__; trl#3194, trl#3196",
        "merge an earlier adapter into the base model first, or give the trainer a PeftModel, of whose adapter newer "
        "versions keep a frozen copy",
    ),
    Rule(
        "trl-dropout",
        TRL,
        "note",
        ("disable_dropout",),
        lambda run: bool(run.terms) and _peft(run) and not run.flag("disable_dropout"),
        "dropout of the model or of its adapter is active while the policy is scored, so the KL is not 0 at the start; "
        "values in the thousands were seen",
        "trl#3500",
        "set disable_dropout to true, and lora_dropout to 0",
    ),
    Rule(
        "trl-liger-loss",
        TRL,
        "warning",
        ("use_liger_kernel",),
        lambda run: run.flag("use_liger_kernel") and bool(run.terms),
        "the loss and its k3 are computed in one fused Liger kernel, which a subclass cannot change and whose "
        "importance ratio was wrong in some versions",
        "Liger-Kernel#1082; trl#7270, trl#6808",
        "set use_liger_kernel to false, or use TRL 1.14",
        versions="<1.14",
    ),
    Rule(
        "trl-rloo-standardised",
        TRL,
        "warning",
        ("normalize_advantages", "beta"),
        lambda run: run.algorithm == "RLOO" and bool(run.terms) and run.flag("normalize_advantages"),
        "advantages, which hold the KL, are divided by their standard deviation over the batch, so the strength of the "
        "KL depends on the spread of the rewards, and not on beta alone",
        "RLOOTrainer._generate_and_score_completions; arXiv 2601.10201; theory: section on group normalisation",
        "set normalize_advantages to false, or use the spec k1@advantage",
    ),
    Rule(
        "trl-rloo-has-no-k3",
        TRL,
        "note",
        ("beta",),
        lambda run: run.algorithm == "RLOO" and _native(run),
        "RLOO has k1 in the reward, summed over the response, before the leave-one-out baseline. k1 is right there: it "
        "is not differentiated, and k3 in its place would be wrong",
        "RLOOTrainer._generate_and_score_completions; trl#7086, trl#7095",
    ),
    Rule(
        "trl-async-has-no-kl",
        TRL,
        "warning",
        _given_to_async,
        lambda run: run.algorithm == "AsyncGRPO" and bool(_given_to_async(run)),
        "AsyncGRPO has neither a reference model nor a KL term; its metric `kl` compares behaviour and current policy",
        "AsyncGRPOTrainer",
        "use GRPO if you need a KL",
        ignored=_given_to_async,
    ),
    Rule(
        "trl-server-logprobs",
        TRL,
        "note",
        ("vllm_mode", "use_vllm"),
        lambda run: bool(run.terms) and run.flag("use_vllm") and run.text("vllm_mode") == "server",
        "the command line of the vLLM server, and not this config, decides which log-probs it reports. Raw ones are "
        "not those of the distribution that it samples from, unless that is the whole one at temperature 1",
        "trl#6166, trl#6693; vLLM's --logprobs-mode",
        "start the server with --logprobs-mode processed_logprobs",
        versions=">=1.11",
    ),
    Rule(
        "trl-unsloth",
        TRL,
        "warning",
        lambda run: (),
        lambda run: "unsloth" in run.settings.imports,
        "the program imports Unsloth, which replaces TRL's trainers by its own. They compute loss and KL themselves, "
        "so what is said here about TRL may not hold",
        "unsloth-zoo#890; unsloth-zoo rl_replacements.py",
        "start a process that does not import it, if you need one of the settings above",
    ),
    Rule(
        "trl-reward-divided-by-std",
        TRL,
        "warning",
        ("scale_rewards", "kl"),
        lambda run: _scored(run) and run.config.scale_rewards != "none",
        "GRPO divides rewards, the KL in them included, by a standard deviation. Where the task rewards of a group "
        "tie, what remains is the KL divided by its own deviation, whatever beta is",
        "GRPOTrainer._generate_and_score_completions; arXiv 2601.10201",
        "use the spec k1@advantage, which is subtracted afterwards, or set scale_rewards to none",
    ),
    Rule(
        "trl-group-mean-shrinks",
        TRL,
        "note",
        ("num_generations", "kl"),
        _scored,
        lambda run: (
            "the mean that is subtracted from a group's rewards contains each response's own KL, so the gradient "
            f"of the KL is multiplied by 1 - 1/{run.number('num_generations'):g}"
        ),
        "theory: Tokens and sequences; arXiv 2601.10201",
    ),
    Rule(
        "trl-gmpo-has-its-own-kl",
        TRL,
        "warning",
        ("use_bias_correction_kl", "beta"),
        lambda run: run.algorithm == "GMPO" and _native(run),
        "GMPO computes its own loss: plain k3, averaged over each response, without a weight, whatever "
        "use_bias_correction_kl says",
        "trl.experimental.gmpo GMPOTrainer._compute_loss",
        "use GRPO, if the KL is to be weighted",
        ignored=lambda run: [key for key in ("use_bias_correction_kl",) if run.given(key)],
    ),
    Rule(
        "trl-other-trainer",
        TRL,
        "warning",
        lambda run: ("beta",) if run.given("beta") else (),
        lambda run: run.algorithm not in ("GRPO", "RLOO", "GMPO", "AsyncGRPO"),
        lambda run: (
            f"trl {run.algorithm} is not a trainer whose KL is explained here. In DPO and distillation, beta is "
            "the temperature of a loss or the mixture of a divergence, and not the coefficient of a KL term"
        ),
        "the documentation of the trainer",
        "give a config of GRPO or RLOO",
    ),
    Rule(
        "trl-spec-without-kl-plugins",
        TRL,
        "error",
        ("kl",),
        lambda run: run.value("kl") is not None and _stock_program(run),
        "the program is TRL's own and does not know the field kl. The command line rejects it, and "
        "`python -m trl.scripts.grpo` drops it in silence",
        "TrlParser.parse_args_and_config",
        "start it by `kl-plugins run trl grpo`, or import the classes from kl_plugins.adapters.trl",
    ),
    Rule(
        "trl-unknown-loss-type",
        TRL,
        "error",
        ("loss_type",),
        lambda run: run.algorithm == "GRPO" and bool(run.terms) and run.text("loss_type") not in MODES,
        "TRL has no loss_type of that name",
        LOSS,
        "use one of dapo, grpo, bnpo, dr_grpo, cispo, vespo, sapo, luspo",
    ),
)
"""The rules about TRL."""
