"""Settings under which a run would train with another KL regulariser than the one named, each with its reason."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from packaging.version import Version

from kl_plugins.adapters.trl.config import (
    PROCESSED,
    WITH_KNOWN_HEAD,
    Run,
    behaviour_source,
    by_sequence,
    installed,
    mode_in,
    sampling_of,
    statement_of,
)
from kl_plugins.spec import KLSpec

LIGER_LOSS_REMOVED = Version("1.14")
"""Before this version, ``use_liger_kernel`` computes loss and KL in one fused kernel that no hook can see into."""

LUSPO_MASKS_PADDING = Version("1.10")
"""Before this version, the luspo loss averages (B, T) terms over padding too, so it weights a token by its length."""

PLACEMENTS = {"_generate_and_score_completions": ("reward", "advantage"), "_calculate_rewards": ("reward",)}
"""Methods of TRL's trainers that only some placements work through."""

RECORDED = ("_generate_and_score_completions",)
"""Methods that specs with ``top:`` work through as well, because the reference is recorded there."""


def problems(spec: KLSpec, run: Run) -> Iterator[str]:
    """Give each contradiction between the spec and a run; runs before any model is loaded.

    Args:
        spec: the parsed spec.
        run: the run. As long as there is only a config, the trainer's arguments and its class are not looked at.
    """
    trl = installed()
    yield from contradictions(spec, run.config, run.algorithm, trl)
    yield from _of_sampling(spec, run, trl)
    if run.arguments is not None:
        yield from _of_arguments(spec, run)
        yield from overridden(spec, run)


def contradictions(spec: KLSpec, config: Any, algorithm: str, trl: Version) -> Iterator[str]:
    """Give each contradiction between the spec and a config.

    Args:
        spec: the parsed spec.
        config: a GRPOConfig or RLOOConfig.
        algorithm: ``GRPO`` or ``RLOO``.
        trl: TRL's version.
    """
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
    yield from exact_problems(spec, config, trl)
    if algorithm == "RLOO" and spec.placement == "loss":
        yield (
            "RLOO has no KL term in its loss and one importance ratio per sequence; use k1@reward (RLOO's own site) or "
            "k1@advantage, or train with GRPO"
        )
    if algorithm == "GRPO":
        yield from _grpo_contradictions(spec, config, trl)


def exact_problems(spec: KLSpec, config: Any, trl: Version) -> Iterator[str]:
    """Give the settings under which the heads that exact terms need are not whole.

    Args:
        spec: the parsed spec.
        config: a GRPOConfig or RLOOConfig.
        trl: TRL's version. Where its fused head is known, ``top:`` reads that head, which gathers its weights itself.
    """
    if spec.needs_exact and (spec.top is None or trl < WITH_KNOWN_HEAD) and _zero_3(config):
        yield (
            "exact terms multiply with the output heads of policy and reference, which ZeRO-3 keeps in pieces; use "
            f"exact@{spec.placement}/top with TRL {WITH_KNOWN_HEAD}, which reads TRL's own head, or ZeRO-2 or FSDP, or "
            "a sampled spec, such as k2@loss/is:token"
        )


def _zero_3(config: Any) -> bool:
    from transformers.integrations import deepspeed

    plugin = getattr(config, "deepspeed_plugin", None)
    return bool(deepspeed.is_deepspeed_zero3_enabled() or getattr(plugin, "zero_stage", None) == 3)


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


def _of_sampling(spec: KLSpec, run: Run, trl: Version) -> Iterator[str]:
    # A config may be made long before its vLLM server is there, so the server is asked when a trainer is built.
    known = sampling_of(run.config, mode_in(run.config, False, trl) or PROCESSED)
    if spec.needs_behaviour:
        yield from known.problems(spec, behaviour_source(spec, run.config, run.with_engine))


def _of_arguments(spec: KLSpec, run: Run) -> Iterator[str]:
    if spec.behaviour == "sampler" and not run.sampler_expected:
        yield (
            "the spec needs the sampler's log-probs, but transformers, which generates the completions, gives none; "
            "set use_vllm, or leave behaviour out (the old log-probs are then used)"
        )
    statement = statement_of(spec, run)
    if statement.sampling is not None:
        yield from statement.sampling.problems(spec, statement.behaviour)


def overridden(spec: KLSpec, run: Run) -> Iterator[str]:
    """Give each method that a subclass replaces without calling TRL's, among those that the spec works through.

    Args:
        spec: the parsed spec.
        run: the run, with its trainer.
    """
    assert run.trainer is not None
    for name, hook in run.methods.items():
        recorded = spec.top is not None and name in RECORDED
        if not recorded and spec.placement not in PLACEMENTS.get(name, (spec.placement,)):
            continue
        function = inspect.unwrap(inspect.getattr_static(run.trainer, name))
        if function is inspect.unwrap(hook):
            continue
        code = getattr(function, "__code__", None)
        if code is None or not {"super", name} <= {*code.co_names, *code.co_freevars}:
            yield (
                f"the trainer is {run.trainer.__module__}.{run.trainer.__qualname__}, and its own {name} never calls "
                "TRL's, so its KL stays as it wrote it; use GRPOTrainer or RLOOTrainer, or set kl to null"
            )
