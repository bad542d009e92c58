"""What OpenRLHF's arguments say about a spec: its weights, how responses are sampled, how terms become one number."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from kl_plugins.adapters.openrlhf.host import ESTIMATOR_FLAG, LOSS_FLAG
from kl_plugins.aggregation import Aggregation
from kl_plugins.sampling import Sampling
from kl_plugins.spec import KLSpec, looks_like_spec
from kl_plugins.spec.target import caveats_with_source

parse = lru_cache(maxsize=64)(KLSpec.parse)
"""A worker reads the same text for every micro-batch."""

PROCESSED = "processed_logprobs"
"""The mode of vLLM in which its log-probs are those of the distribution that it samples from."""

LOGPROBS_SETTING = "logprobs_mode of create_vllm_engines"

PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""vLLM's penalties, with the values that change nothing."""

GLOBAL_MEAN_SINCE = Version("0.10.4")
"""OpenRLHF's losses are means over an optimizer batch since this version, and over each micro-batch before it."""

MICRO_BATCH_CAVEAT = (
    f"OpenRLHF before {GLOBAL_MEAN_SINCE} averages over the tokens of each micro-batch first, so a token counts more "
    "in a micro-batch that has few"
)
GSPO_CAVEAT = (
    "GSPO multiplies every token's advantage with the ratio of the whole sequence, so the KL of a token acts on all "
    "tokens of its response alike, and late tokens count more than under the target; use a @loss spec"
)
AGENT_CAVEAT = "an agent of your own may sample with other settings, or return log-probs of another kind"


def spec_of(args: Any) -> KLSpec | None:
    """The spec that a run is asked for, or None for one of OpenRLHF's own estimators.

    Args:
        args: OpenRLHF's nested arguments.

    Raises:
        KLSpecError: the text is not a valid spec.
        ValueError: its placement and ``--algo.kl.use_loss`` contradict each other; the message names what to change.
    """
    text = args.algo.kl.estimator
    if not looks_like_spec(text):
        return None
    spec = parse(text)
    if spec.placement == "loss" and not args.algo.kl.use_loss:
        raise ValueError(
            f"kl-plugins: {ESTIMATOR_FLAG} {spec} is a @loss spec, but OpenRLHF puts the KL into the reward: add "
            f"{LOSS_FLAG}, or use a @reward or @advantage spec"
        )
    if spec.placement != "loss" and args.algo.kl.use_loss:
        raise ValueError(
            f"kl-plugins: {ESTIMATOR_FLAG} {spec} is a @{spec.placement} spec, but OpenRLHF puts the KL into the loss: "
            f"drop {LOSS_FLAG}, or use a @loss spec"
        )
    return spec


def corrects_policy_loss(args: Any) -> bool:
    """Whether OpenRLHF's own importance sampling is on, so that it asks vLLM for log-probs."""
    advantage = args.algo.advantage
    if hasattr(advantage, "is_correction_level"):  # since 0.11.2
        return bool(advantage.is_correction_level != "off")
    return bool(advantage.is_correction_enable)


def needs_sampler(args: Any) -> bool:
    """Whether the spec needs the sampler's log-probs where OpenRLHF itself would not ask for them."""
    spec = spec_of(args)
    return spec is not None and spec.behaviour == "sampler" and not corrects_policy_loss(args)


def behaviour_source(spec: KLSpec, args: Any) -> str:
    """Where the behaviour policy's log-probs come from: ``sampler``, ``old`` or ``unused``."""
    if not spec.needs_behaviour:
        return "unused"
    if spec.behaviour is not None:
        return spec.behaviour
    return "sampler" if corrects_policy_loss(args) else "old"


def sampling_of(args: Any) -> Sampling:
    """How responses are sampled. Where log-probs are needed, OpenRLHF or a hook asks vLLM for processed ones."""
    return Sampling(float(args.rollout.temperature), float(args.rollout.top_p), logprobs_setting=LOGPROBS_SETTING)


def sampling_in(given: Mapping[str, Any]) -> Sampling:
    """The same of the arguments that vLLM's ``SamplingParams`` is built with: a launcher of one's own may add some."""
    return Sampling(
        temperature=float(given.get("temperature", 1.0)),
        top_p=float(given.get("top_p", 1.0)),
        top_k=int(given.get("top_k", 0)),
        min_p=float(given.get("min_p", 0.0)),
        penalised=any(given.get(name, neutral) != neutral for name, neutral in PENALTIES.items()),
        logprobs_setting=LOGPROBS_SETTING,
    )


def require_weights(spec: KLSpec, args: Any, sampling: Sampling) -> None:
    """Raise where a spec's weights would be wrong under these settings of generation.

    Raises:
        ValueError: why, and what to do.
    """
    for problem in sampling.problems(spec, behaviour_source(spec, args)):
        raise ValueError(f"kl-plugins: {ESTIMATOR_FLAG} {spec} cannot be used here: {problem}")


def aggregation_of(spec: KLSpec, args: Any) -> Aggregation:
    """What OpenRLHF does with the terms of all tokens: its KL loss has its own way, a score goes the policy loss's."""
    if spec.placement == "loss":
        if Version(version("openrlhf")) < GLOBAL_MEAN_SINCE:
            return Aggregation("token mean", f"of each micro-batch: OpenRLHF's KL loss before {GLOBAL_MEAN_SINCE}")
        return Aggregation("token mean", "OpenRLHF's KL loss, whatever the policy loss does")
    if args.actor.policy_loss_type == "gspo":
        return Aggregation("sequence mean", "--actor.policy_loss_type gspo")
    mode = getattr(args.actor, "loss_agg_mode", None)  # since 0.11.2
    if mode is None:
        return Aggregation("token mean", "OpenRLHF's policy loss")
    return Aggregation("token mean" if mode == "token-mean" else "sequence mean", f"--actor.loss_agg_mode {mode}")


def caveats_of(spec: KLSpec, args: Any) -> tuple[str, ...]:
    """What bends the estimate although the target stays: of the spec, and of OpenRLHF's settings."""
    source = behaviour_source(spec, args)
    found = [*caveats_with_source(spec, source), *aggregation_of(spec, args).caveats]
    if Version(version("openrlhf")) < GLOBAL_MEAN_SINCE:
        found.append(MICRO_BATCH_CAVEAT)
    if spec.placement != "loss" and args.actor.policy_loss_type == "gspo":
        found.append(GSPO_CAVEAT)
    found += sampling_of(args).caveats(spec, source)
    if getattr(args.train, "agent_func_path", None):
        found.append(AGENT_CAVEAT)
    return tuple(found)
