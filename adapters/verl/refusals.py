"""Settings that are refused, because the regulariser would not be the one named, and parts that were not tested."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from kl_plugins.adapters.base import parse_observation
from kl_plugins.adapters.verl import LOSS_BETA, LOSS_KEY, SCORE_BETA, SCORE_KEY
from kl_plugins.adapters.verl.config import (
    Specs,
    behaviour_source,
    bypasses,
    estimator_of,
    logprobs_mode,
    sampling_of,
    spec_in,
)
from kl_plugins.adapters.versions import refuse_untested
from kl_plugins.sampling import PRODUCTS
from kl_plugins.spec import KLSpec
from kl_plugins.spec.observation import looks_like_observation

REWARD_ESTIMATORS = (
    "gae",
    "grpo",
    "grpo_vectorized",
    "rloo",
    "rloo_vectorized",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "opo",
    "gpg",
    "optimal_token_baseline",
    "tir_optimal_token_baseline",
)
"""Estimators whose advantages depend on the rewards of every response, and so on its KL."""

WITHOUT_KL = {
    "gdpo": "it normalises the components in algorithm.gdpo_reward_keys and never reads rewards that hold a KL",
    "grpo_passk": "it gives the best response of a group an advantage and all others none, so their KL is dropped",
}
"""Estimators under which a KL in the reward is lost, with the reason."""

ADVANTAGE_ESTIMATORS = ("grpo", "gae", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")
"""Estimators whose advantages are per token and final, so that a per-token penalty may be subtracted from them."""

PER_TOKEN_LOSSES = ("vanilla", "gspo", "gpg", "cispo")
"""Policy losses that are linear in each token's own advantage, up to clipping by its sign."""

WITHOUT_EXCHANGE = ("sdpa", "eager", "flex_attention")
"""Values of ``attn_implementation`` under which veRL's ranks that share a sequence do not exchange its tokens."""

FUSED_BACKENDS = ("torch",)
"""Values of ``fused_kernel_options.impl_backend`` that the tests run."""


def contradictions(specs: Specs, config: Any) -> Iterator[tuple[str, KLSpec, str]]:
    """Give each contradiction between the specs and the rest of the config.

    Args:
        specs: what the config asks for.
        config: veRL's ``DictConfig``.

    Returns:
        The setting up to the spec, the spec, and the problem with what to do about it.
    """
    if specs.loss is not None:
        yield from ((f"{LOSS_KEY}=", specs.loss, problem) for problem in _loss_contradictions(specs.loss, config))
    if specs.score is not None:
        yield from ((f"{SCORE_KEY}=", specs.score, problem) for problem in _score_contradictions(specs.score, config))


def _loss_contradictions(spec: KLSpec, config: Any) -> Iterator[str]:
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    if not actor.use_kl_loss:
        yield "actor_rollout_ref.actor.use_kl_loss is False, so veRL would ignore it; set it to True"
    if spec.needs_exact:
        yield from exact_problems(spec, config)
    yield from _beta_problems(spec, LOSS_BETA, actor.kl_loss_coef)
    yield from _sampling_problems(spec, config)
    yield from _attention_problems(config)
    if spec.behaviour == "sampler" and not rollout.calculate_log_probs:
        yield (
            "behaviour:sampler needs the sampler's log-probs; set actor_rollout_ref.rollout.calculate_log_probs=True, "
            "or leave behaviour out (the weight then divides by the trainer's old log-probs)"
        )


def _score_contradictions(spec: KLSpec, config: Any) -> Iterator[str]:
    algorithm, actor = config.algorithm, config.actor_rollout_ref.actor
    if not algorithm.use_kl_in_reward:
        yield "algorithm.use_kl_in_reward is False, so veRL would ignore it; set it to True"
    if spec.needs_exact:
        yield (
            "exact terms need the logits, which veRL's trainer process never has, also under top:; use an exact @loss "
            "spec"
        )
    yield from _beta_problems(spec, SCORE_BETA, algorithm.kl_ctrl.kl_coef)
    yield from _attention_problems(config)
    if spec.beta is not None and algorithm.kl_ctrl.type != "fixed":
        yield (
            f"the spec's beta:{spec.beta.kind} and algorithm.kl_ctrl.type={algorithm.kl_ctrl.type} would both "
            "control beta; set algorithm.kl_ctrl.type=fixed or leave beta out of the spec"
        )
    if spec.beta is not None and config.get("async_training") is not None:
        yield (
            "the fully asynchronous trainer saves its checkpoints in a way of its own, so the state of "
            f"beta:{spec.beta.kind} would be lost where a run is resumed; leave beta out, or use a @loss spec"
        )
    if bypasses(config):
        yield (
            "algorithm.rollout_correction.bypass_mode=True puts the engine's log-probs in place of the "
            "trainer's, so the KL would hold their mismatch; set bypass_mode=False, or use a @loss spec"
        )
    if spec.placement == "advantage":
        yield from _advantage_problems(algorithm, actor)
    else:
        yield from _reward_problems(algorithm)


def _reward_problems(algorithm: Any) -> Iterator[str]:
    estimator = estimator_of(algorithm)
    if estimator in REWARD_ESTIMATORS:
        return
    reason = WITHOUT_KL.get(
        estimator, "it is not veRL's own, so kl-plugins cannot know whether its advantages depend on every reward"
    )
    yield (
        f"under algorithm.adv_estimator={estimator} a KL in the reward may have no effect: {reason}. Use one of "
        f"{', '.join(REWARD_ESTIMATORS)}, or a @loss spec"
    )


def _advantage_problems(algorithm: Any, actor: Any) -> Iterator[str]:
    estimator = estimator_of(algorithm)
    if estimator not in ADVANTAGE_ESTIMATORS:
        yield (
            f"@advantage was checked with {', '.join(ADVANTAGE_ESTIMATORS)}, not with "
            f"algorithm.adv_estimator={estimator}"
        )
    if algorithm.get("use_pf_ppo", False):
        yield "algorithm.use_pf_ppo resamples the batch while advantages are computed; set it to False, or use @reward"
    mode = str(actor.policy_loss.get("loss_mode", "vanilla"))
    if mode not in PER_TOKEN_LOSSES:
        yield (
            f"actor_rollout_ref.actor.policy_loss.loss_mode={mode} does not use each token's own advantage "
            f"linearly; use one of {', '.join(PER_TOKEN_LOSSES)}, or a @loss spec"
        )


def _sampling_problems(spec: KLSpec, config: Any) -> Iterator[str]:
    source, sampling = behaviour_source(spec, config), sampling_of(config)
    yield from sampling.problems(spec, source)
    if source != "sampler":
        return
    setting, mode = logprobs_mode(config)
    if "logits" in mode:
        yield (
            f"{setting}={mode} makes the engine report logits, which are no log-probs; set it to "
            "processed_logprobs, or use behaviour:old in the spec"
        )
    if str(config.actor_rollout_ref.rollout.get("name")) == "sglang" and sampling.truncated:
        yield (
            "whether SGLang reports log-probs from before or after truncation depends on its version and sampling "
            f"backend, so under {sampling} the importance weights may be wrong; sample the whole distribution (top_p "
            "1, top_k -1), or use behaviour:old in the spec"
        )


def _attention_problems(config: Any) -> Iterator[str]:
    """Say where log-probs would not be those of the model, because ranks see a part of a sequence each."""
    chosen = (config.actor_rollout_ref.model.get("override_config") or {}).get("attn_implementation")
    for role in ("actor", "ref"):
        section = config.actor_rollout_ref.get(role) or {}
        if ranks_per_sequence(section) > 1 and chosen in WITHOUT_EXCHANGE:
            yield (
                f"actor_rollout_ref.{role}.ulysses_sequence_parallel_size > 1 gives each rank a part of a sequence, "
                "and veRL exchanges the parts in flash attention alone: under "
                f"attn_implementation={chosen} each rank attends to its own part, and log-probs are not those of the "
                "model; set attn_implementation in actor_rollout_ref.model.override_config to flash_attention_2"
            )
            return


def ranks_per_sequence(section: Any) -> int:
    """Return how many ranks share a sequence in a role of veRL's config (Ulysses); 1 for other engines.

    Args:
        section: ``actor`` or ``ref`` of ``actor_rollout_ref``.
    """
    parts = (section, section.get("fsdp_config") or {})  # where the first is above 1, veRL puts it over the second
    return next((int(size) for part in parts if (size := part.get("ulysses_sequence_parallel_size", 1)) > 1), 1)


def exact_problems(spec: KLSpec, config: Any) -> Iterator[str]:
    """Give the settings under which veRL's engine does not show the logits that exact terms need.

    Args:
        spec: a ``@loss`` spec with exact terms, applied or observed.
        config: veRL's ``DictConfig``.
    """
    model, actor = config.actor_rollout_ref.model, config.actor_rollout_ref.actor
    if actor.strategy not in ENGINES:
        yield (
            f"actor_rollout_ref.actor.strategy={actor.strategy} does not show the whole logits of a token to one "
            "process, and exact terms need them; use a sampled spec, such as k2@loss/is:token"
        )
    adapted = model.get("lora_rank", 0) or (model.get("lora") or {}).get("rank", 0) or model.get("lora_adapter_path")
    if adapted and spec.top is None:
        yield (
            "under LoRA veRL keeps no reference model beside the actor, and exact terms need its logits; use "
            "exact@loss/top, which takes what it needs from the pass that computes ref_log_prob"
        )
    if model.get("use_fused_kernels", False):
        yield (
            "actor_rollout_ref.model.use_fused_kernels=True computes log-probs in a kernel that never holds the logits "
            "of a token, and exact terms need them; set it to False"
        )
    roles = {"actor": actor} if spec.top is None or adapted else {"actor": actor, "ref": config.actor_rollout_ref.ref}
    for role, section in roles.items():
        engine = section.get("fsdp_config") or {}
        if engine.get("pad_to_length", False):
            yield (
                f"actor_rollout_ref.{role}.fsdp_config.pad_to_length keeps veRL's engine from showing its logits; "
                "unset it"
            )
    if spec.top is None and ranks_per_sequence(actor) != ranks_per_sequence(config.actor_rollout_ref.get("ref") or {}):
        yield (
            "actor_rollout_ref.actor and actor_rollout_ref.ref have different ulysses_sequence_parallel_size, so that "
            "a rank would hold the logits of other tokens of the reference than of the policy; set both to the same "
            "number, or use exact@loss/top"
        )


def _beta_problems(spec: KLSpec, key: str, value: float) -> Iterator[str]:
    if value < 0:
        yield f"{key} is {value}; a negative coefficient drives the policy away from the reference"
    if value == 0 and (spec.beta is None or spec.beta.kind == "adaptive"):
        yield f"{key} is 0, so nothing would be regularised; set it to the coefficient"


def check_sessions(spec: KLSpec, keys: Sequence[str]) -> None:
    """Raise where an agent loop gave several outputs in one session and the spec has terms that belong together.

    Under GRPO veRL takes the advantages of a session from its last output alone, so a KL in the reward of the others
    is dropped. Sums over later tokens and products of weights end where a row ends.

    Args:
        spec: what the user named.
        keys: of the rows of a batch, ``{uid}_{session}_{index of the output}``.

    Raises:
        ValueError: how many sessions, and what to do.
    """
    own_tokens = spec.placement != "reward" and spec.horizon == "token" and spec.correction not in PRODUCTS
    several = {key.rpartition("_")[0] for key in keys if key.rpartition("_")[2] not in ("", "0")}
    if own_tokens or not several:
        return
    raise ValueError(
        f"kl-plugins: the agent loop gave several outputs in {len(several)} sessions of this batch, and veRL trains on "
        f"each output as a response of its own. {spec} has terms that belong to the whole session: they would stop at "
        "the ends of outputs, and a KL in the reward would count in the last output alone. Use a spec whose terms "
        "belong to single tokens, such as k2@loss/is:token, or an agent loop with one output per session"
    )


ENGINES = ("fsdp", "fsdp2")
"""Training engines (``actor.strategy``) that share the engine the tests run."""

MEGATRON = "megatron"
"""The engine that ``tests/verl/test_megatron.py`` runs in part."""

TRAINERS = (
    "verl.trainer.ppo.ray_trainer.RayPPOTrainer",
    "verl.trainer.ppo.v1.trainer_sync.PPOTrainerSync",
    "verl.trainer.ppo.v1.trainer_colocate_async.PPOTrainerColocateAsync",
    "verl.trainer.ppo.v1.trainer_separate_async.PPOTrainerSeparateAsync",
    "verl.experimental.one_step_off_policy.ray_trainer.OneStepOffRayTrainer",
    "verl.experimental.fully_async_policy.fully_async_trainer.FullyAsyncTrainer",
)
"""Trainer classes that the tests run."""

MODES = ("sync", "colocate_async", "separate_async")
"""Values of ``trainer.v1.trainer_mode`` that the tests run."""

FIRST_ASYNCHRONOUS = Version("0.9.1")
"""The first version of veRL whose asynchronous trainers the tests run."""


def _asks_reference(text: Any) -> bool:
    """Return whether the key of the loss holds a spec with ``top:``, applied or observed."""
    spec = parse_observation(text).spec if looks_like_observation(text) else spec_in(LOSS_KEY, text)
    return spec is not None and spec.top is not None


def check_trainer(trainer: type) -> None:
    """Raise for a trainer class that was not tested: it may bypass the hooks.

    Raises:
        UnsupportedHostError: the class, by name.
    """
    name = f"{trainer.__module__}.{trainer.__name__}"  # Ray gives the class of an actor another __qualname__
    if name not in TRAINERS:
        refuse_untested(f"the trainer {name} was not tested with kl-plugins (tested: {', '.join(TRAINERS)})")
    if name.startswith("verl.experimental.") and _before_asynchronous():
        refuse_untested(f"the trainer {name} was not tested with veRL before {FIRST_ASYNCHRONOUS}")


def _before_asynchronous() -> bool:
    return Version(version("verl")) < FIRST_ASYNCHRONOUS


def untested(config: Any) -> Iterator[str]:
    """Name each part of veRL that the config picks and that the tests do not run.

    Args:
        config: veRL's ``DictConfig``.
    """
    model, actor = config.actor_rollout_ref.model, config.actor_rollout_ref.actor
    if actor.strategy == MEGATRON:
        yield (
            "the engine actor_rollout_ref.actor.strategy=megatron was tested with sampled specs on a CPU alone, with "
            "stand-ins for what needs a GPU, and not in a whole run of veRL"
        )
    elif actor.strategy not in ENGINES:
        yield (
            f"the engine actor_rollout_ref.actor.strategy={actor.strategy} was not tested "
            f"(tested: {', '.join(ENGINES)})"
        )
    reference = config.actor_rollout_ref.ref.get("strategy", actor.strategy)
    if _asks_reference(actor.get("kl_loss_type")) and reference not in ENGINES:
        yield (
            f"the engine actor_rollout_ref.ref.strategy={reference}, which has to show its logits under top:, was not "
            f"tested (tested: {', '.join(ENGINES)})"
        )
    backend = (model.get("fused_kernel_options") or {}).get("impl_backend", FUSED_BACKENDS[0])  # veRL's default
    if model.get("use_fused_kernels", False) and backend not in FUSED_BACKENDS:
        yield (
            f"actor_rollout_ref.model.fused_kernel_options.impl_backend={backend} computes log-probs in a kernel that "
            f"was not tested (tested: {', '.join(FUSED_BACKENDS)})"
        )
    if actor.get("use_prefix_grouper", False):
        yield "actor_rollout_ref.actor.use_prefix_grouper=True was not tested; set it to False"
    if (config.get("distillation") or {}).get("enabled", False):
        yield "distillation.enabled=True puts another loss around the PPO loss, which was not tested; set it to False"
    trainer = config.trainer
    if trainer.get("use_v1", False):
        mode = trainer.v1.trainer_mode
        if mode not in MODES:
            yield f"trainer.v1.trainer_mode={mode} was not tested (tested: {', '.join(MODES)})"
        elif mode != "sync" and _before_asynchronous():
            yield f"trainer.v1.trainer_mode={mode} was not tested with veRL before {FIRST_ASYNCHRONOUS}"
