"""Hooks in OpenRLHF's policy workers: the KL, training steps, the optimizer's step; and the worker's receipt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kl_plugins.adapters import receipts
from kl_plugins.adapters.base import parse_observation
from kl_plugins.adapters.controller import Controller
from kl_plugins.adapters.micro_batch import KLSource, carried, current, entered, unknown_place
from kl_plugins.adapters.openrlhf import COEFFICIENT_FLAG, HOST
from kl_plugins.adapters.openrlhf.batch import MicroBatch
from kl_plugins.adapters.openrlhf.config import (
    behaviour_source,
    corrects_policy_loss,
    sampling_of,
    spec_of,
    statement_of,
)
from kl_plugins.adapters.openrlhf.exact import measure_states, states_kl
from kl_plugins.adapters.openrlhf.observe import default_word, observation_of
from kl_plugins.adapters.openrlhf.session import WorkerSession
from kl_plugins.adapters.openrlhf.shared_sequences import is_counted
from kl_plugins.patches.engine.arguments import Function, arguments, replaced
from kl_plugins.patches.engine.patch import hooked
from kl_plugins.patches.openrlhf import ACTOR, HOOKS, STRATEGY, reference
from kl_plugins.receipts import Receipt
from kl_plugins.spec import looks_like_spec
from kl_plugins.spec.observation import Observation, looks_like_observation

ATTRIBUTE = "_kl_plugins"
"""Attribute of an ``ActorPPOTrainer`` that holds its session; absent where it trains as stock OpenRLHF."""

PLACES = (
    "a @loss spec works in ActorPPOTrainer.training_step, a @reward or @advantage spec in "
    "RemoteExperienceMaker.make_experience"
)
"""Where OpenRLHF may ask for the KL of a spec."""

Forward = Callable[[Any], Tensor]
"""Reference logits (B, L, V), packed (1, N, V), of OpenRLHF's micro-batch, scaled by the temperature."""


def session_of(trainer: Any) -> WorkerSession | None:
    """Return the session of a worker's trainer, or None where it trains without a ``@loss`` spec."""
    session: WorkerSession | None = vars(trainer).get(ATTRIBUTE)
    if session is None:
        args = trainer.args
        observation = observation_of(args)
        if observation is not None:
            return _observing(trainer, observation)
        spec = spec_of(args)
        if spec is None or spec.placement != "loss":
            return None
        control = Controller(spec.beta, args.algo.kl.init_coef, COEFFICIENT_FLAG)
        session = WorkerSession(
            HOST,
            spec,
            control,
            behaviour_source(spec, args),
            rounded=args.ds.param_dtype != "fp32",
            copies=args.ds.ring_attn_size * args.ds.tensor_parallel_size,
            counted=is_counted(trainer.strategy.ds_device_mesh),
        )
        setattr(trainer, ATTRIBUTE, session)
    return session


def _observing(trainer: Any, observation: Observation) -> WorkerSession | None:
    """Make the session of a trainer whose KL in the loss is observed; None where the KL is in the reward."""
    args, spec = trainer.args, observation.measured
    if not args.algo.kl.use_loss:
        return None
    control = Controller(None, args.algo.kl.init_coef, COEFFICIENT_FLAG)
    session = WorkerSession(
        HOST,
        spec,
        control,
        behaviour_source(spec, args),
        observation=observation,
        truncated=sampling_of(args).shows_kept_mass and corrects_policy_loss(args),
    )
    setattr(trainer, ATTRIBUTE, session)
    return session


def approx_kl(wrapped: Function, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around ``compute_approx_kl``, by the names under which training step and experience maker call it."""
    named = arguments(wrapped, args, kwargs)
    text = named["kl_estimator"]
    if looks_like_observation(text):
        return _observed(wrapped, args, kwargs, named)
    if not looks_like_spec(text):
        return wrapped(*args, **kwargs)
    source = current(KLSource)
    if source is None:
        raise unknown_place(text, HOST.title, PLACES)
    return source.term(named["log_probs"], named["log_probs_base"])


def _observed(wrapped: Function, args: tuple[Any, ...], kwargs: dict[str, Any], named: dict[str, Any]) -> Any:
    """Let OpenRLHF compute its own KL under its own word, and measure the observed spec on the same log-probs."""
    word = parse_observation(named["kl_estimator"]).native or default_word()
    args, kwargs = replaced(wrapped, args, kwargs, kl_estimator=word)
    kl = wrapped(*args, **kwargs)
    source = current(KLSource)
    if source is not None:
        others = {**named, "kl_estimator": word, "log_probs_base": named["log_probs_base"].detach()}
        source.observe(
            named["log_probs"], named["log_probs_base"], lambda logp: wrapped(**{**others, "log_probs": logp})
        )
    return kl


def training_step(wrapped: Function, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around one micro-batch: its tensors are carried to the KL function; beta follows the spec's schedule."""
    session = session_of(trainer)
    if session is None:
        return wrapped(*args, **kwargs)
    if session.observation is not None:
        return _observed_step(wrapped, trainer, session, args, kwargs)
    session.require_confirmed("require_receipts(actor_group, args)")
    named = arguments(wrapped, args, kwargs)
    batch = MicroBatch.read(session, named["experience"])
    args, kwargs = replaced(wrapped, args, kwargs, kl_ctl=session.coefficient(named["kl_ctl"]))
    engine = trainer.actor.model
    before = engine.global_steps
    with carried(batch), logits_watched(trainer, session, batch, named["experience"]):
        status = wrapped(*args, **kwargs)
    session.keep(batch)
    if engine.global_steps != before and session.unchecked:
        raise RuntimeError(
            f"kl-plugins: DeepSpeed made an optimizer step under {session.spec} that did not go through "
            "DeepspeedStrategy.optimizer_step, so its log-probs were not checked; this strategy is not known"
        )
    return status


def _observed_step(
    wrapped: Function, trainer: Any, session: WorkerSession, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Let OpenRLHF train on one micro-batch as it does alone, and keep the metrics of the observed spec."""
    named = arguments(wrapped, args, kwargs)
    batch = MicroBatch.read(session, named["experience"])
    session.applied, session.steps = float(named["kl_ctl"]), int(trainer.actor.model.global_steps) + 1
    with entered(batch), logits_watched(trainer, session, batch, named["experience"]):
        status = wrapped(*args, **kwargs)
    if batch.metrics is not None:
        session.keep(batch)
    return status


def optimizer_step(wrapped: Function, strategy: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around DeepSpeed's step, the last place where all ranks can stop together before weights change."""
    batch = current(MicroBatch)
    if batch is not None and batch.session.observation is None:
        model = arguments(wrapped, args, kwargs)["model"]
        engine = getattr(model, "model", model)  # OpenRLHF's Actor holds the engine
        if engine.is_gradient_accumulation_boundary():
            batch.session.check_step()
    return wrapped(*args, **kwargs)


def ppo_train(wrapped: Function, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around all epochs over the replay buffer: their KL and its metrics go into the status that OpenRLHF logs."""
    session = session_of(trainer)
    status = wrapped(*args, **kwargs)
    if session is not None:
        status.update(session.report())
    return status


def receipt(process: Any, spec: str, behaviour: str) -> Receipt:
    """Make the receipt of a worker, and with it let a policy worker train.

    Args:
        process: the Ray actor's object, a ``PolicyModelActor``; under ``top:`` also a ``ReferenceModelActor``.
        spec: the canonical spec that the trainer expects.
        behaviour: where the trainer says that the behaviour policy's log-probs come from.

    Raises:
        RuntimeError: the worker's loss would not go through the hooks, or it holds another spec.
        UnsupportedHostError: this OpenRLHF is not one that was checked.
    """
    HOOKS.check_process()
    if not hasattr(process, "trainer"):
        return reference.receipt(process, spec, behaviour)
    trainer = process.trainer
    if not hooked(type(trainer), "training_step"):
        raise RuntimeError(f"its {type(trainer).__qualname__} overrides the training step that has the hook")
    session = session_of(trainer)
    if session is None or session.text != spec:
        raise RuntimeError(f"it was started with {trainer.args.algo.kl.estimator}, not with {spec}")
    if session.behaviour != behaviour:
        raise RuntimeError(f"it takes the behaviour policy's log-probs from {session.behaviour}, not from {behaviour}")
    if session.spec.needs_exact and session.spec.top is None and session.reference is None:
        session.reference = reference_of(trainer)
    statement = statement_of(session.spec, trainer.args)
    wrapped = HOOKS.summary([ACTOR, STRATEGY])
    ranks = int(process._rank), int(process._world_size)
    made = receipts.made(HOST, session.spec, statement, wrapped, *ranks, observation=session.observation)
    session.confirmed = True
    receipts.announce(made)
    return made


def saved(process: Any) -> dict[str, Any]:
    """Return the controller's state of a policy worker; runs there."""
    session = session_of(process.trainer)
    return {} if session is None else session.controller.saved()


def restore(process: Any, state: dict[str, Any] | None) -> None:
    """Give a policy worker a checkpoint's controller state; runs there."""
    session = session_of(process.trainer)
    if session is not None:
        session.controller.restore(state)


@contextmanager
def logits_watched(trainer: Any, session: WorkerSession, batch: MicroBatch, experience: Any) -> Iterator[None]:
    """Within the block, the actor's forward pass gives the micro-batch the KL of its states.

    Args:
        trainer: an ``ActorPPOTrainer``.
        session: of the worker; nothing is done without exact terms.
        batch: gets the KL.
        experience: OpenRLHF's micro-batch.
    """
    observed = session.observation is not None
    if not session.spec.needs_exact or (observed and batch.numbers is None):
        yield
        return
    forward: Forward | None = session.reference

    def after_actor(actor: Any, given: Any, output: Any) -> None:
        handle.remove()  # under LoRA the reference's pass is one of the same module
        logp, logits = output[0], output[1]["logits"]
        if observed:
            measure_states(batch, logp, logits, experience)
            return
        ref_logits = None if forward is None else partial(forward, experience)
        session.keep_difference(states_kl(batch, logp, logits, experience, ref_logits))

    handle = trainer.actor.register_forward_hook(after_actor)
    try:
        yield
    finally:
        handle.remove()


def reference_of(trainer: Any) -> Forward:
    """Make the reference's forward pass: the actor without its adapter under LoRA, else a second, frozen copy.

    Args:
        trainer: an ``ActorPPOTrainer``.
    """
    if trainer.args.ds.lora.rank > 0:
        return _without_adapter(trainer.actor, trainer.strategy)
    from openrlhf.trainer.ray.launcher import ReferenceModelActor

    host: Any = ReferenceModelActor.__ray_metadata__.modified_class

    class LocalReference(host):  # type: ignore[misc]
        """OpenRLHF's reference actor in a process whose process group is there already."""

        def __init__(self) -> None: ...

        def _setup_distributed(self, strategy: Any) -> None:
            self.strategy = strategy

    reference = LocalReference()
    reference.init_model_from_pretrained(trainer.strategy, trainer.args.actor.model_name_or_path)
    return lambda experience: _logits(reference.model, trainer.strategy, experience)


def _without_adapter(actor: Any, strategy: Any) -> Forward:
    def forward(experience: Any) -> Tensor:
        training = actor.training
        actor.eval()
        try:
            with actor.model.module.disable_adapter():
                return _logits(actor, strategy, experience)
        finally:
            actor.train(training)

    return forward


def _logits(model: Any, strategy: Any, experience: Any) -> Tensor:
    images = {}
    if experience.mm_train_inputs and getattr(model, "is_vlm", False):
        from openrlhf.utils.vlm_utils import merge_mm_train_inputs

        images = merge_mm_train_inputs(experience.mm_train_inputs, experience.sequences.device)
    with torch.no_grad():
        _, output = model(
            experience.sequences,
            experience.action_mask,
            attention_mask=experience.attention_mask,
            return_output=True,
            ring_attn_group=strategy.ring_attn_group,
            **images,
        )
    logits: Tensor = output["logits"]
    return logits
