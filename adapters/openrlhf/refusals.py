"""Refusals: settings under which the regulariser would not be the one named, each with its reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from kl_plugins.adapters.openrlhf import COEFFICIENT_FLAG, ESTIMATOR_FLAG
from kl_plugins.adapters.openrlhf.config import PROCESSED, behaviour_source, sampling_of
from kl_plugins.adapters.receipts import timeout
from kl_plugins.sampling import Sampling
from kl_plugins.spec import KLSpec

ADVANTAGE_ESTIMATORS = ("group_norm", "rloo", "reinforce", "reinforce_baseline", "dr_grpo", "gae", "flash_reinforce")
"""Estimators whose advantages are per token and final, so that a per-token penalty may be subtracted from them."""


def contradictions(spec: KLSpec, args: Any) -> Iterator[str]:
    """Give each contradiction between a spec and the other arguments.

    Args:
        spec: what the user named.
        args: OpenRLHF's nested arguments.
    """
    kl = args.algo.kl
    if kl.init_coef == 0:
        yield f"{COEFFICIENT_FLAG} is 0, so OpenRLHF loads no reference model; set it to the coefficient"
    if kl.init_coef < 0:
        yield f"{COEFFICIENT_FLAG} is {kl.init_coef}; a negative coefficient drives the policy away from the reference"
    if getattr(kl, "unbiased_gradient", False):
        yield (
            "--algo.kl.unbiased_gradient changes OpenRLHF's own estimators and would have no effect; drop it "
            "(k2@loss/is:token/cap:10/behaviour:old has the same gradient)"
        )
    if spec.beta is not None and kl.target:
        yield (
            f"the spec's beta:{spec.beta.kind} and --algo.kl.target would both control beta; drop --algo.kl.target, or "
            "leave beta out of the spec"
        )
    yield from sampling_of(args).problems(spec, behaviour_source(spec, args))
    if spec.needs_exact:
        yield from exact_problems(spec, args)
    if spec.placement == "advantage":
        yield from _advantage_problems(args)


def exact_problems(spec: KLSpec, args: Any) -> Iterator[str]:
    """Give the settings under which a process does not have the logits that exact terms need.

    Args:
        spec: a spec with exact terms, applied or observed.
        args: OpenRLHF's nested arguments.
    """
    if spec.placement != "loss":
        yield "exact terms need the logits, which OpenRLHF has only while it trains; use an exact @loss spec"


def _advantage_problems(args: Any) -> Iterator[str]:
    estimator = args.algo.advantage.estimator
    if estimator not in ADVANTAGE_ESTIMATORS:
        yield (
            f"@advantage was checked with {', '.join(ADVANTAGE_ESTIMATORS)}, not with "
            f"--algo.advantage.estimator {estimator}"
        )
    if args.actor.policy_loss_type != "ppo":
        yield (
            f"--actor.policy_loss_type {args.actor.policy_loss_type} multiplies every token's advantage with the ratio "
            "of the whole sequence, so a per-token penalty would not act on its own token; use ppo, or a @loss spec"
        )


def require_weights(spec: KLSpec, args: Any, sampling: Sampling) -> None:
    """Raise where a spec's weights would be wrong under these settings of generation.

    Args:
        spec: what the user named.
        args: OpenRLHF's nested arguments.
        sampling: how responses are sampled.

    Raises:
        ValueError: why, and what to do.
    """
    for problem in sampling.problems(spec, behaviour_source(spec, args)):
        raise ValueError(f"kl-plugins: {ESTIMATOR_FLAG} {spec} cannot be used here: {problem}")


def require_processed(engines: Sequence[Any] | None, spec: KLSpec, args: Any) -> None:
    """Raise where an engine reports log-probs that a weight must not divide by.

    OpenRLHF's own program starts its engines in the right mode. Another launcher may not.

    Args:
        engines: handles of OpenRLHF's ``RolloutRayActor``; None where there are none.
        spec: the ``@loss`` spec of the run.
        args: OpenRLHF's nested arguments.

    Raises:
        ValueError: the spec's weights would be wrong.
    """
    if not engines or behaviour_source(spec, args) != "sampler":
        return
    import ray

    # Defined here, so that it is pickled by value: an engine's process without kl-plugins can run it too.
    def mode(engine: Any) -> Any:
        return engine.kwargs.get("logprobs_mode")

    modes = ray.get([engine.__ray_call__.remote(mode) for engine in engines], timeout=timeout())
    if any(found != PROCESSED for found in modes):
        require_weights(spec, args, replace(sampling_of(args), raw=True))
