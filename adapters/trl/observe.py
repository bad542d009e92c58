"""``observe`` in TRL: the spec that equals TRL's own KL, what cannot be observed, and what a trainer does instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback

from kl_plugins.adapters.base import parse, parse_observation
from kl_plugins.adapters.explained.run import Term, settings_of
from kl_plugins.adapters.observe import require_unregularised, warn_unobserved
from kl_plugins.adapters.receipts import Statement, announce
from kl_plugins.adapters.trl import FIELD, HOST, unsloth
from kl_plugins.adapters.trl.config import (
    PROCESSED,
    Run,
    aggregation,
    behaviour_source,
    cost,
    installed,
    mode_in,
    reward_site,
    sampling_of,
)
from kl_plugins.adapters.trl.ranks import exchange
from kl_plugins.adapters.trl.refusals import LIGER_LOSS_REMOVED, exact_problems, overridden
from kl_plugins.adapters.trl.session import STATE_KEY, Session
from kl_plugins.spec.observation import Observation, looks_like_observation


def observation_of(run: Run) -> Observation | None:
    """Read what a run asks to observe; None if it does not.

    Args:
        run: the run.

    Raises:
        KLSpecError: the text is not valid.
        UnsupportedHostError: Unsloth is in this process, so the hooks would not be called.
    """
    if not looks_like_observation(run.text):
        return None
    observation = parse_observation(run.text)
    unsloth.refuse(f"{FIELD}={run.text!r} cannot be used here")
    term = native_term(run)
    # Without a term the observation is refused; the spec then stands for nothing.
    return observation.of(parse("k3@loss") if term is None else term.spec)


def native_term(run: Run) -> Term | None:
    """Return TRL's own KL term, with the spec that has its gradient; None where beta is 0.

    Args:
        run: the run.
    """
    from kl_plugins.adapters.trl.explained import TRLRun

    explained = TRLRun(HOST, installed(), settings_of({}))
    explained.algorithm = run.algorithm
    values = {key: getattr(run.config, key) for key in explained.defaults if hasattr(run.config, key) and key != FIELD}
    explained.settings = settings_of(values)
    return next(iter(explained.terms), None)


def problems(observation: Observation, run: Run) -> Iterator[str]:
    """Give each reason why a run cannot be observed; runs before any model is loaded.

    Args:
        observation: what the run asks for.
        run: the run. As long as there is only a config, the trainer's arguments and its class are not looked at.
    """
    config, spec = run.config, observation.measured
    if observation.native is not None:
        yield (
            f"TRL has no setting for the estimator of its own KL, so nothing may stand before observe; leave "
            f"{observation.native!r} out"
        )
    if config.beta == 0 and run.arguments is not None and not scores_reference(run):
        yield (
            "beta is 0, so TRL loads no reference model and computes no KL; set beta to a very small number, such as "
            "1e-10, to observe a run that trains without a KL"
        )
    if config.beta == 0 and not observation.named:
        yield "beta is 0, so the run has no KL of its own that observe could measure; name a spec: observe:k2@loss"
    if getattr(config, "use_liger_kernel", False) and installed() < LIGER_LOSS_REMOVED and run.algorithm == "GRPO":
        yield f"TRL {installed()} computes the loss in one fused Liger kernel; set use_liger_kernel to false"
    if spec.needs_exact and run.algorithm == "RLOO":
        yield (
            "exact terms are observed where TRL computes its own KL from the policy's pass, and RLOO puts its KL into "
            "the reward; use a sampled spec, such as k2@loss/is:token, or train with GRPO"
        )
    yield from exact_problems(spec, config, installed())
    source = behaviour_source(spec, config, run.sampler_expected or run.arguments is None)
    if spec.needs_behaviour:
        known = sampling_of(config, mode_in(config, run.own_rollout, installed()) or PROCESSED)
        yield from known.problems(spec, source)
    if run.arguments is not None:
        if spec.behaviour == "sampler" and not run.sampler_expected:
            yield (
                "the spec needs the sampler's log-probs, but transformers, which generates the completions, gives "
                "none; set use_vllm, or leave behaviour out (the old log-probs are then used)"
            )
        own = parse("k1@reward" if run.algorithm == "RLOO" else "k2@loss")
        yield from overridden(spec if spec.needs_exact else own, run)


def scores_reference(run: Run) -> bool:
    """Whether kl-plugins has to let TRL score a reference, and can: GRPO with beta 0, whose policy has an adapter.

    The reference is then the model with its adapter off, so that no second model is loaded.

    Args:
        run: the run, with the trainer's arguments.
    """
    given = run.arguments or {}
    adapted = given.get("peft_config") is not None or hasattr(given.get("model"), "peft_config")
    return bool(run.algorithm == "GRPO" and run.config.beta == 0 and adapted)


def statement_of(observation: Observation, run: Run) -> Statement:
    """State what a run makes of its observation; a vLLM server is not asked anything.

    Args:
        observation: what the run asks for.
        run: the run, with the trainer's arguments.
    """
    spec, term = observation.measured, native_term(run)
    nearest = () if observation.named or term is None or term.equal else (
        "TRL's own KL has the gradient of no spec; the observed one is the nearest",
    )  # fmt: skip
    costs = [cost(spec, observed=True)]
    if scores_reference(run):
        costs.append("a forward pass with the adapter off per rollout, because beta is 0")
    return Statement(
        aggregation=aggregation(run.algorithm, run.config),
        behaviour=behaviour_source(spec, run.config, run.sampler_expected),
        sampling=sampling_of(run.config, mode_in(run.config, run.own_rollout, installed())),
        caveats=nearest,
        reward_site=reward_site(run.algorithm, run.config) if spec.placement == "reward" else "",
        cost=", and ".join(filter(None, costs)),
    )


class ObservingCallback(TrainerCallback):  # type: ignore[misc]
    """Drives the session of a trainer that is observed: the receipts at the start, and the steps of the probes."""

    def __init__(self, session: Session) -> None:
        """Take over a session."""
        self.session = session

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log and exchange receipts.

        Raises:
            SpecChangedError: the checkpoint was written under a spec.
        """
        receipt = self.session.receipt()
        announce(receipt)
        exchange(receipt)
        assert self.session.observation is not None
        require_unregularised(state.stateful_callbacks.get(STATE_KEY), self.session.observation)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the optimizer step that begins."""
        self.session.steps = state.global_step + 1

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say so, once, where the KL of an update was not seen."""
        assert self.session.observation is not None
        if "loss" not in self.session.passed:
            warn_unobserved(HOST.title, self.session.observation)
        self.session.passed.discard("loss")
