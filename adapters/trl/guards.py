"""Refusals: combinations that would train with a KL regulariser other than the one named, each with its reason."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from kl_plugins.adapters.trl import sampling
from kl_plugins.adapters.trl.advantage import by_sequence
from kl_plugins.adapters.trl.log_probs import behaviour_source
from kl_plugins.sampling import Sampling
from kl_plugins.spec import KLSpec

LIGER_LOSS_REMOVED = Version("1.14")
"""Up to here ``use_liger_kernel`` computes loss and KL in one fused kernel that no hook can see into."""

LUSPO_MASKS_PADDING = Version("1.10")
"""Before this, the luspo loss averages (B, T) terms over padding as well, and so weights a token by its length."""

ROLLOUT_WITHOUT_VLLM = Version("0.29.1")
"""Before this, TRL calls ``rollout_func`` only from its vLLM client."""


def check_config(spec: KLSpec, config: Any, algorithm: str) -> None:
    """Raise where the spec and the config contradict each other; runs before any model is loaded.

    Args:
        spec: the parsed spec.
        config: a GRPOConfig or RLOOConfig.
        algorithm: ``GRPO`` or ``RLOO``.

    Raises:
        ValueError: the first contradiction, with what to do.
    """
    trl = Version(version("trl"))
    for problem in (*_contradictions(spec, config, algorithm, trl), *_of_sampling(spec, config, trl)):
        raise ValueError(f"kl-plugins: kl={str(spec)!r} cannot be used here: {problem}")


def _of_sampling(spec: KLSpec, config: Any, trl: Version) -> Iterator[str]:
    with_engine = bool(getattr(config, "use_vllm", False))
    mode = sampling.mode_in(config, False, trl)
    # A server is asked only when a trainer is built: a config may be made long before it is there.
    known = sampling.sampling_of(config, mode or sampling.PROCESSED)
    if spec.needs_behaviour:
        yield from known.problems(spec, behaviour_source(spec, config, with_engine))


def _zero_3(config: Any) -> bool:
    from transformers.integrations import deepspeed

    plugin = getattr(config, "deepspeed_plugin", None)
    return bool(deepspeed.is_deepspeed_zero3_enabled() or getattr(plugin, "zero_stage", None) == 3)


def _contradictions(spec: KLSpec, config: Any, algorithm: str, trl: Version) -> Iterator[str]:
    if config.beta == 0:
        yield "beta is 0, so TRL loads no reference model; set beta to the coefficient of the KL regulariser"
    if config.beta < 0:
        yield f"beta is {config.beta}; a negative coefficient drives the policy away from the reference"
    scoring = getattr(config, "temperature", 1.0)
    generating = (getattr(config, "generation_kwargs", None) or {}).get("temperature", scoring)
    if generating != scoring:
        yield (
            f"generation_kwargs samples at temperature {generating:g}, while TRL scores with {scoring:g}, so its "
            "log-probs are not those of the policy that is sampled; set temperature instead"
        )
    if spec.needs_exact and _zero_3(config):
        yield (
            "exact terms multiply with the output heads of policy and reference, which ZeRO-3 keeps in pieces; use "
            "ZeRO-2 or FSDP, or a sampled spec, such as k2@loss/is:token"
        )
    if spec.top is not None:
        yield "TRL's exact terms sum the whole vocabulary; there are no logits that top: could pick from; drop top:"
    if algorithm == "RLOO" and spec.placement == "loss":
        yield (
            "RLOO has no KL term in its loss and one importance ratio per sequence; use k1@reward (RLOO's own site) or "
            "k1@advantage, or train with GRPO"
        )
    if algorithm == "GRPO":
        yield from _grpo_contradictions(spec, config, trl)


def _grpo_contradictions(spec: KLSpec, config: Any, trl: Version) -> Iterator[str]:
    if getattr(config, "use_liger_kernel", False) and trl < LIGER_LOSS_REMOVED:
        yield f"TRL {trl} computes the loss, its k3 included, in one fused Liger kernel; set use_liger_kernel to false"
    if spec.placement == "reward" and getattr(config, "multi_objective_aggregation", "") == "normalize_then_sum":
        yield (
            "normalize_then_sum divides every reward by its own standard deviation, which would divide beta out; "
            "use multi_objective_aggregation=sum_then_normalize, or @advantage"
        )
    if config.loss_type == "luspo" and trl < LUSPO_MASKS_PADDING and spec.placement != "reward":
        yield (
            f"luspo in TRL {trl} averages per-token terms over padding, so tokens of long responses count more; use "
            f"TRL {LUSPO_MASKS_PADDING} or another loss_type"
        )
    if spec.placement != "advantage":
        return
    if getattr(config, "top_entropy_quantile", 1.0) < 1:
        yield (
            f"top_entropy_quantile {config.top_entropy_quantile:g} drops the policy loss of tokens with low entropy, "
            "and a penalty in the advantages with it; use @loss, or set top_entropy_quantile to 1"
        )
    if config.loss_type == "sapo" and by_sequence(config):
        yield (
            "sapo puts a soft gate around one ratio per sequence, and the penalty of a token would pass it with "
            "another factor than its advantage; set importance_sampling_level to token, or use @loss"
        )
    if getattr(config, "off_policy_mask_threshold", None) is not None:
        yield (
            "off_policy_mask_threshold decides by the sign of a sequence's advantage, and @advantage makes advantages "
            "differ within a sequence; use @loss or @reward, or leave the threshold unset"
        )
    if config.loss_type == "vespo":
        yield "vespo weights a sequence by the sign of its advantage, which @advantage makes differ by token; use @loss"


def check_arguments(spec: KLSpec, config: Any, arguments: Mapping[str, Any]) -> tuple[str, Sampling]:
    """Raise where the spec and the trainer's constructor arguments contradict each other, before TRL builds anything.

    Where the config does not say which log-probs a vLLM server reports, and a weight divides by them, it is asked.

    Args:
        spec: the parsed spec.
        config: the trainer's config.
        arguments: what the trainer was called with, by name.

    Returns:
        What the importance weight divides by (see :func:`behaviour_source`), and how completions are sampled.

    Raises:
        ValueError: the contradiction, with what to do.
    """
    external = [n for n in ("tools", "environment_factory", "rollout_func") if arguments.get(n)]
    if spec.placement == "reward" and external:
        raise ValueError(
            f"kl-plugins: kl={str(spec)!r} cannot be used with {', '.join(external)}: where TRL computes rewards it "
            "hides which tokens the policy wrote, so KL would be charged for tool output; use @loss or @advantage"
        )
    if spec.behaviour == "sampler" and not sampler_log_probs_expected(config, arguments):
        raise ValueError(
            f"kl-plugins: kl={str(spec)!r} needs the sampler's log-probs, but transformers, which generates the "
            "completions, gives none; set use_vllm, or leave behaviour out (the old log-probs are then used)"
        )
    source = behaviour_source(spec, config, sampler_log_probs_expected(config, arguments))
    with_engine = bool(getattr(config, "use_vllm", False))
    mode = sampling.mode_in(config, bool(arguments.get("rollout_func")), Version(version("trl")))
    if mode is None and with_engine and source == "sampler":
        mode = sampling.mode_of_server(config)
    found = sampling.sampling_of(config, mode)
    for problem in found.problems(spec, source):
        raise ValueError(f"kl-plugins: kl={str(spec)!r} cannot be used here: {problem}")
    return source, found


def sampler_log_probs_expected(config: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether TRL will hand over the log-probs that completions were sampled with."""
    own_rollout = arguments.get("rollout_func") and Version(version("trl")) >= ROLLOUT_WITHOUT_VLLM
    return bool(getattr(config, "use_vllm", False) or own_rollout)


def check_overrides(spec: KLSpec, trainer: type, methods: Mapping[str, Any]) -> None:
    """Raise where a subclass replaces a method that the spec works through, without calling TRL's.

    Args:
        spec: the parsed spec.
        trainer: the class being built.
        methods: all hooks of TRL's class, by method name; those that the spec does not work through are passed over.

    Raises:
        ValueError: the class and the method.
    """
    placements = {"_generate_and_score_completions": ("reward", "advantage"), "_calculate_rewards": ("reward",)}
    for name, hook in methods.items():
        if spec.placement not in placements.get(name, (spec.placement,)):
            continue
        function = inspect.unwrap(inspect.getattr_static(trainer, name))
        if function is inspect.unwrap(hook):
            continue
        code = getattr(function, "__code__", None)
        if code is None or not {"super", name} <= {*code.co_names, *code.co_freevars}:
            raise ValueError(
                f"kl-plugins: kl={str(spec)!r} cannot be used with {trainer.__module__}.{trainer.__qualname__}: its "
                f"own {name} never calls TRL's, so its KL stays as it wrote it. Use GRPOTrainer or RLOOTrainer, or set "
                "kl to null"
            )
