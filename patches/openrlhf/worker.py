"""Hooks in OpenRLHF's policy workers: the KL, one training step, all of them; and the worker's receipt."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from kl_plugins.adapters.beta import LossBeta
from kl_plugins.adapters.micro_batch import carried, current
from kl_plugins.adapters.openrlhf.exact import cost
from kl_plugins.adapters.openrlhf.loss import MicroBatch
from kl_plugins.adapters.openrlhf.session import Session
from kl_plugins.adapters.openrlhf.settings import behaviour_source, spec_of
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
        session = Session(spec, LossBeta(spec.beta, float(trainer.args.algo.kl.init_coef)))
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
    batch = MicroBatch.read(session.spec, trainer.args, named["experience"])
    beta = session.coefficient(named["kl_ctl"])
    args, kwargs = replaced(wrapped, args, kwargs, kl_ctl=beta)
    engine = trainer.actor.model
    before = engine.global_steps
    with carried(batch), exact.watching(trainer, session.reference, batch, named["experience"]):
        status = wrapped(*args, **kwargs)
    session.finish(batch, beta)
    if engine.global_steps != before:  # DeepSpeed made an optimizer step of the accumulated gradients
        session.beta.step(trainer.strategy.ds_device_mesh["dp"].get_group())
    return status


def ppo_train(wrapped: Function, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around all epochs over the replay buffer: their KL metrics go into the status that OpenRLHF logs."""
    session = session_of(trainer)
    status = wrapped(*args, **kwargs)
    if session is not None:
        status.update(session.metrics.reduced(distributed=True))
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
    from kl_plugins.patches.openrlhf.targets import ACTOR, PATCHES
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
    used = [patch for patch in PATCHES.patches if patch.module == ACTOR]
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
        cost=cost(session.spec, trainer.args),
    )
    session.confirmed = True
    announce(made)
    return made


def saved(process: Any) -> dict[str, Any]:
    """The controller's state of a policy worker; runs there."""
    session = session_of(process.trainer)
    return {} if session is None else session.saved()


def restore(process: Any, state: dict[str, Any] | None) -> None:
    """Give a policy worker a checkpoint's controller state; runs there."""
    session = session_of(process.trainer)
    if session is not None:
        session.restore(state)
