"""Refusals: settings under which the regulariser would not be the one named, each with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kl_plugins.adapters.openrlhf.host import COEFFICIENT_FLAG, ESTIMATOR_FLAG
from kl_plugins.adapters.openrlhf.settings import behaviour_source, sampling_of, spec_of
from kl_plugins.spec import KLSpec

ADVANTAGE_ESTIMATORS = ("group_norm", "rloo", "reinforce", "reinforce_baseline", "dr_grpo", "gae", "flash_reinforce")
"""Estimators whose advantages are per token and final, so that a per-token penalty may be subtracted from them."""


def checked(args: Any) -> KLSpec | None:
    """The arguments' spec after every check that needs no model and no Ray; None for OpenRLHF's own estimators.

    Args:
        args: OpenRLHF's nested arguments.

    Raises:
        KLSpecError: the text is not a valid spec.
        ValueError: the spec and other settings contradict each other; the message says what to do.
    """
    spec = spec_of(args)
    if spec is not None:
        for problem in _contradictions(spec, args):
            raise ValueError(f"kl-plugins: {ESTIMATOR_FLAG} {spec} cannot be used here: {problem}")
    return spec


def _contradictions(spec: KLSpec, args: Any) -> Iterator[str]:
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
        yield from _exact_problems(spec, args)
    if spec.placement == "advantage":
        yield from _advantage_problems(args)


def _exact_problems(spec: KLSpec, args: Any) -> Iterator[str]:
    if spec.placement != "loss":
        yield "exact terms need the logits, which OpenRLHF has only while it trains; use an exact @loss spec"
    for flag, on in (
        ("--ds.packing_samples", args.ds.packing_samples),
        ("--ds.tensor_parallel_size", args.ds.tensor_parallel_size > 1),
        ("--ds.ring_attn_size", args.ds.ring_attn_size > 1),
    ):
        if on:
            yield f"exact terms were not tested with {flag}, under which logits are packed or sharded; drop it"


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
