"""Hooks in OpenRLHF's policy workers: the KL, training steps, the optimizer's step; and the worker's receipt."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from kl_plugins.adapters.controller import Controller
from kl_plugins.adapters.micro_batch import carried, current
from kl_plugins.adapters.openrlhf.exact import cost
from kl_plugins.adapters.openrlhf.host import COEFFICIENT_FLAG
from kl_plugins.adapters.openrlhf.loss import MicroBatch
from kl_plugins.adapters.openrlhf.session import Session
from kl_plugins.adapters.openrlhf.settings import aggregation_of, behaviour_source, caveats_of, sampling_of, spec_of
from kl_plugins.adapters.receipts import announce
from kl_plugins.patches.arguments import Function, arguments, replaced
from kl_plugins.patches.openrlhf import exact
from kl_plugins.receipts import Receipt
from kl_plugins.spec import looks_like_spec

ATTRIBUTE = "_kl_plugins"
"""Attribute of an ``ActorPPOTrainer`` that holds its session; absent where it trains as stock OpenRLHF."""


def session_of(trainer: Any) -> Session | None:
    """The session of a worker's trainer, or None where it trains without a ``@loss`` spec."""
    session: Session | None = vars(trainer).get(ATTRIBUTE)
    if session is None:
        spec = spec_of(trainer.args)
        if spec is None or spec.placement != "loss":
            return None
        control = Controller(spec.beta, trainer.args.algo.kl.init_coef, COEFFICIENT_FLAG)
        session = Session(spec, control, rounded=trainer.args.ds.param_dtype != "fp32")
        setattr(trainer, ATTRIBUTE, session)
    return session


def approx_kl(wrapped: Function, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around ``compute_approx_kl`` by the name under which the training step calls it: a spec gets its own term."""
    named = arguments(wrapped, args, kwargs)
    text = named["kl_estimator"]
    if not looks_like_spec(text):
        return wrapped(*args, **kwargs)
    batch = current()
    if batch is None:
        raise RuntimeError(
            f"kl-plugins: {text} reached OpenRLHF's KL function from a place that kl-plugins does not know; a @loss "
            "spec works in ActorPPOTrainer.training_step"
        )
    return batch.term(named["log_probs"], named["log_probs_base"])


def training_step(wrapped: Function, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around one micro-batch: its tensors are carried to the KL function; beta follows the spec's schedule."""
    session = session_of(trainer)
    if session is None:
        return wrapped(*args, **kwargs)
    session.require_confirmed()
    named = arguments(wrapped, args, kwargs)
    batch = MicroBatch.read(session, trainer.args, named["experience"])
    args, kwargs = replaced(wrapped, args, kwargs, kl_ctl=session.coefficient(named["kl_ctl"]))
    engine = trainer.actor.model
    before = engine.global_steps
    with carried(batch), exact.watching(trainer, session.reference, batch, named["experience"]):
        status = wrapped(*args, **kwargs)
    if engine.global_steps != before and session.unchecked:
        raise RuntimeError(
            f"kl-plugins: DeepSpeed made an optimizer step under {session.spec} that did not go through "
            "DeepspeedStrategy.optimizer_step, so its log-probs were not checked; this strategy is not known"
        )
    return status


def optimizer_step(wrapped: Function, strategy: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around DeepSpeed's step, the last place where all ranks can stop together before weights change."""
    batch = current()
    if isinstance(batch, MicroBatch) and batch.session is not None:
        model = arguments(wrapped, args, kwargs)["model"]
        engine = getattr(model, "model", model)  # OpenRLHF's Actor holds the engine
        if engine.is_gradient_accumulation_boundary():
            batch.session.before_step(strategy.ds_device_mesh["dp"].get_group())
    return wrapped(*args, **kwargs)


def ppo_train(wrapped: Function, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around all epochs over the replay buffer: their KL and its metrics go into the status that OpenRLHF logs."""
    session = session_of(trainer)
    status = wrapped(*args, **kwargs)
    if session is not None:
        status.update(session.report())
    return status


def receipt(process: Any, spec: str, behaviour: str) -> Receipt:
    """The receipt of a policy worker, and with it the leave to train.

    Args:
        process: the Ray actor's object, a ``PolicyModelActor``.
        spec: the canonical spec that the trainer expects.
        behaviour: where the trainer says that the behaviour policy's log-probs come from.

    Raises:
        RuntimeError: the worker's loss would not go through the hooks, or it holds another spec.
        UnsupportedHostError: this OpenRLHF is not one that was checked.
    """
    from kl_plugins.patches.openrlhf.support import check_process
    from kl_plugins.patches.openrlhf.targets import ACTOR, PATCHES, STRATEGY
    from kl_plugins.patches.patch import hooked

    check_process()
    trainer = process.trainer
    if not hooked(type(trainer), "training_step"):
        raise RuntimeError(f"its {type(trainer).__qualname__} overrides the training step that has the hook")
    session = session_of(trainer)
    if session is None or str(session.spec) != spec:
        raise RuntimeError(f"it was started with {trainer.args.algo.kl.estimator}, not with {spec}")
    source = behaviour_source(session.spec, trainer.args)
    if source != behaviour:
        raise RuntimeError(f"it takes the behaviour policy's log-probs from {source}, not from {behaviour}")
    if session.spec.needs_exact and session.reference is None:
        session.reference = exact.reference_of(trainer)
    used = [patch for patch in PATCHES.patches if patch.module in (ACTOR, STRATEGY)]
    made = Receipt(
        rank=int(process._rank),
        world_size=int(process._world_size),
        host="OpenRLHF",
        host_version=version("openrlhf"),
        patches=tuple(patch.qualname for patch in used),
        fingerprint=PATCHES.fingerprint(used),
        spec=str(session.spec),
        target=session.spec.target,
        behaviour=source,
        aggregation=str(aggregation_of(session.spec, trainer.args)),
        sampling=str(sampling_of(trainer.args)),
        caveats=caveats_of(session.spec, trainer.args),
        cost=cost(session.spec, trainer.args),
    )
    session.confirmed = True
    announce(made)
    return made


def saved(process: Any) -> dict[str, Any]:
    """The controller's state of a policy worker; runs there."""
    session = session_of(process.trainer)
    return {} if session is None else session.beta.saved()


def restore(process: Any, state: dict[str, Any] | None) -> None:
    """Give a policy worker a checkpoint's controller state; runs there."""
    session = session_of(process.trainer)
    if session is not None:
        session.beta.restore(state)
