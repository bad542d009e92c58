"""The spec in OpenRLHF's arguments, and what they say about the sampler's log-probs."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from kl_plugins.adapters.openrlhf.host import ESTIMATOR_FLAG, LOSS_FLAG
from kl_plugins.spec import KLSpec, looks_like_spec

parse = lru_cache(maxsize=64)(KLSpec.parse)
"""A worker reads the same text for every micro-batch."""


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
