"""What OpenRLHF's arguments say about a spec: its weights, how responses are sampled, how terms become one number."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from kl_plugins.adapters.base import parse
from kl_plugins.adapters.openrlhf import ESTIMATOR_FLAG, LOSS_FLAG
from kl_plugins.adapters.receipts import Statement
from kl_plugins.aggregation import Aggregation
from kl_plugins.sampling import Sampling
from kl_plugins.spec import KLSpec, looks_like_spec
from kl_plugins.spec.grammar import numbers_per_token
from kl_plugins.spec.observation import looks_like_observation

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
    """Read the spec that a run is asked for; None for one of OpenRLHF's own estimators, alone or with ``observe``.

    Args:
        args: OpenRLHF's nested arguments.

    Raises:
        KLSpecError: the text is not a valid spec.
        ValueError: its placement and ``--algo.kl.use_loss`` contradict each other; the message names what to change.
    """
    text = args.algo.kl.estimator
    if looks_like_observation(text) or not looks_like_spec(text):
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
    """Return whether OpenRLHF's own importance sampling is on, so that it asks vLLM for log-probs."""
    advantage = args.algo.advantage
    if hasattr(advantage, "is_correction_level"):  # since 0.11.2
        return bool(advantage.is_correction_level != "off")
    return bool(advantage.is_correction_enable)


def needs_sampler(args: Any) -> bool:
    """Return whether the spec needs the sampler's log-probs where OpenRLHF itself would not ask for them."""
    spec = spec_of(args)
    return spec is not None and spec.behaviour == "sampler" and not corrects_policy_loss(args)


def behaviour_source(spec: KLSpec, args: Any) -> str:
    """Return where the behaviour policy's log-probs come from: ``sampler``, ``old`` or ``unused``."""
    if not spec.needs_behaviour:
        return "unused"
    if spec.behaviour is not None:
        return spec.behaviour
    return "sampler" if corrects_policy_loss(args) else "old"


def sampling_of(args: Any) -> Sampling:
    """Describe how responses are sampled. If log-probs are needed, OpenRLHF or a hook asks vLLM for processed ones."""
    return Sampling(float(args.rollout.temperature), float(args.rollout.top_p), logprobs_setting=LOGPROBS_SETTING)


def sampling_in(given: Mapping[str, Any]) -> Sampling:
    """Describe how responses are sampled under the arguments of vLLM's ``SamplingParams``.

    A launcher that is not OpenRLHF's own may pass settings that are not among OpenRLHF's arguments.

    Args:
        given: the keyword arguments.
    """
    return Sampling(
        temperature=float(given.get("temperature", 1.0)),
        top_p=float(given.get("top_p", 1.0)),
        top_k=int(given.get("top_k", 0)),
        min_p=float(given.get("min_p", 0.0)),
        penalised=any(given.get(name, neutral) != neutral for name, neutral in PENALTIES.items()),
        logprobs_setting=LOGPROBS_SETTING,
    )


def aggregation_of(spec: KLSpec, args: Any) -> Aggregation:
    """Describe what OpenRLHF does with the terms of all tokens.

    OpenRLHF's KL loss has a rule of its own. A score becomes part of the advantages, so the policy loss's rule holds.
    """
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


def statement_of(spec: KLSpec, args: Any) -> Statement:
    """Describe what OpenRLHF's settings make of a spec, for a receipt.

    Args:
        spec: what the user named.
        args: OpenRLHF's nested arguments.
    """
    caveats = []
    if Version(version("openrlhf")) < GLOBAL_MEAN_SINCE:
        caveats.append(MICRO_BATCH_CAVEAT)
    if spec.placement != "loss" and args.actor.policy_loss_type == "gspo":
        caveats.append(GSPO_CAVEAT)
    if getattr(args.train, "agent_func_path", None):
        caveats.append(AGENT_CAVEAT)
    return Statement(
        aggregation=aggregation_of(spec, args),
        behaviour=behaviour_source(spec, args),
        sampling=sampling_of(args),
        caveats=tuple(caveats),
        reward_site="" if spec.placement == "loss" else reward_site(spec, args),
        cost=exact_cost(spec, args) if spec.needs_exact else "",
    )


def exact_cost(spec: KLSpec, args: Any) -> str:
    """Describe what exact terms add to OpenRLHF's own work."""
    if spec.top is not None:
        form = "2 k + 1" if spec.draws is None else "2 k + 3 m + 2"
        count = numbers_per_token(spec.top, spec.draws)
        return f"{form} = {count} numbers per response token from the reference actor's own pass"
    copy = "" if args.ds.lora.rank > 0 else "a second copy of the reference in every policy worker, and "
    each = "a forward pass of the reference with its logits (tokens x vocabulary) per micro-batch"
    return f"{copy}{each}; top: in the spec needs none of this"


def reward_site(spec: KLSpec, args: Any) -> str:
    """Describe what OpenRLHF does with a KL in the reward."""
    advantage = args.algo.advantage
    whitening = "centring" if advantage.no_std_norm else "whitening"
    if spec.placement == "advantage":
        return f"none: subtracted per token from final {advantage.estimator} advantages"
    if advantage.estimator == "gae":
        return f"token rewards - beta * k_t, then GAE with the critic, then {whitening} over the batch"
    if advantage.estimator == "reinforce":
        return f"token rewards - beta * k_t, then discounted returns to go, then {whitening} over the batch"
    after = f", then {whitening} over the batch" if advantage.estimator == "reinforce_baseline" else ""
    return (
        f"the {advantage.estimator} baseline comes from task rewards alone; then token rewards - beta * k_t, summed to "
        f"returns to go{after}"
    )
