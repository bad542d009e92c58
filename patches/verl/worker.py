"""Hooks in veRL's training workers: the loss, one optimizer step, checkpoints; and the worker's receipt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kl_plugins.adapters.checkpoints import record, resumed
from kl_plugins.adapters.micro_batch import carried
from kl_plugins.adapters.verl.beta import read_state, write_state
from kl_plugins.adapters.verl.exact import LOGITS, cost
from kl_plugins.adapters.verl.loss import MicroBatch
from kl_plugins.adapters.verl.session import Session, Total
from kl_plugins.adapters.verl.settings import aggregation_caveats, aggregation_of, loss_spec
from kl_plugins.patches.arguments import Function, arguments
from kl_plugins.patches.patch import Hook
from kl_plugins.patches.verl import exact
from kl_plugins.receipts import Receipt
from kl_plugins.spec.target import caveats_with_source

if TYPE_CHECKING:
    from torch import Tensor

ATTRIBUTE = "_kl_plugins"
"""Attribute of a training worker that holds its session; absent on stock workers."""

_active: ContextVar[Session | None] = ContextVar("kl_plugins_verl_session", default=None)


def session_of(worker: Any) -> Session | None:
    """The session of a worker's present loss function, or None where it trains as stock veRL."""
    loss_fn = getattr(worker, "loss_fn", None)
    config = getattr(loss_fn, "keywords", {}).get("config")
    spec = loss_spec(config)
    if config is None or spec is None:
        return None
    session: Session | None = vars(worker).get(ATTRIBUTE)
    if session is None or session.loss_fn is not loss_fn:
        session = Session.of(spec, loss_fn, config)
        setattr(worker, ATTRIBUTE, session)
    return session


def ppo_loss(wrapped: Function, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around ``ppo_loss(config, model_output, data, dp_group)``: its batch is carried to the KL function."""
    if LOGITS in kwargs:  # the engine shows its logits; only asked to where a spec needs them
        return exact.on_logits(_active.get(), **kwargs)
    named = dict(arguments(wrapped, args, kwargs))
    spec = loss_spec(named["config"])
    if spec is None:
        return wrapped(*args, **kwargs)
    session = _active.get()
    if session is None:
        raise RuntimeError(
            f"kl-plugins: veRL's PPO loss was called with {spec} outside of TrainingWorker.train_batch; this "
            "engine or trainer is not one that kl-plugins was tested with"
        )
    batch = MicroBatch.read(spec, named["data"], session.behaviour)
    if spec.needs_exact:
        batch.exact = exact.of_model_output(spec, named["model_output"], named["data"])
    named["config"] = session.config_with_beta(named["config"])
    with carried(batch):
        loss, metrics = wrapped(**named)
    metrics.update(session.finish(batch, _metric))
    return loss, metrics


def _metric(aggregation: str, value: float) -> Any:
    from verl.utils.metric import Metric

    return Metric(aggregation=aggregation, value=value)


def train_batch(wrapped: Function, worker: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around one optimizer step of a worker."""
    session = session_of(worker)
    if session is None:
        return wrapped(*args, **kwargs)
    session.require_confirmed()
    session.start_step()
    total = partial(_total, worker.engine.get_data_parallel_group())
    token = _active.set(session)
    try:
        with (
            exact.showing_logits(session, arguments(wrapped, args, kwargs)["data"]),
            _checked_steps(worker.engine, session, total),
        ):
            output = wrapped(*args, **kwargs)
    finally:
        _active.reset(token)
    session.controller.step(total)
    return output


@contextmanager
def _checked_steps(engine: Any, session: Session, total: Total) -> Iterator[None]:
    """Within the block, the engine's optimizer steps only if the step's log-probs are sound on all ranks.

    Then the gradients are there, and nothing is updated yet. veRL itself would skip the update where the norm of the
    gradient is not finite, and go on.

    Raises:
        RuntimeError: the block ended without a step.
    """
    step, own, steps = engine.optimizer_step, vars(engine).get("optimizer_step"), 0

    def checked(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        session.check(total)
        steps += 1
        return step(*args, **kwargs)

    engine.optimizer_step = checked
    try:
        yield
    finally:
        del engine.optimizer_step
        if own is not None:
            engine.optimizer_step = own
    if steps != 1:
        raise RuntimeError(
            f"kl-plugins: veRL's engine took {steps} optimizer steps in one train_batch instead of one, so the "
            f"log-probs that {session.spec} needs were not checked; this engine is not known"
        )


def _total(group: Any, numbers: Tensor) -> Tensor:
    import torch.distributed

    if group is not None:
        torch.distributed.all_reduce(numbers, group=group)
    return numbers


def save_checkpoint(wrapped: Function, worker: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around a worker's checkpoint: the spec and the controller's state go beside its shard."""
    result = wrapped(*args, **kwargs)
    session, folder = session_of(worker), arguments(wrapped, args, kwargs)["local_path"]
    if session is not None and folder:
        write_state(_state_file(folder, worker), record(session.spec, session.controller.saved()))
    return result


def load_checkpoint(wrapped: Function, worker: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around a worker's resume: another spec is refused before anything is loaded."""
    session, folder = session_of(worker), arguments(wrapped, args, kwargs)["local_path"]
    if session is not None and folder:
        # Read first: veRL may delete the folder after loading.
        session.controller.restore(resumed(read_state(_state_file(folder, worker)), session.spec))
    return wrapped(*args, **kwargs)


def _state_file(folder: str, worker: Any) -> Path:
    return Path(folder) / f"kl_plugins_rank_{worker.rank}.json"


def receipt(process: Any, spec: str, behaviour: str) -> Receipt:
    """The receipt of a Ray worker, and with it the leave to train.

    Args:
        process: the Ray actor's object: a training worker, or one that holds training workers.
        spec: the canonical spec that the trainer expects.
        behaviour: where the trainer says that the behaviour policy's log-probs come from.

    Raises:
        RuntimeError: the worker's loss would not go through the hooks, or holds another spec.
        UnsupportedHostError: this veRL is not one that was checked.
    """
    from kl_plugins.patches.verl.support import check_process
    from kl_plugins.patches.verl.targets import PATCHES

    check_process()
    worker, session = next(_sessions(process), (None, None))
    if worker is None or session is None:
        raise RuntimeError("its loss function holds no KL spec; was it started with another config?")
    if not isinstance(getattr(session.loss_fn, "func", None), Hook):
        raise RuntimeError(f"its loss function {session.loss_fn} is not veRL's hooked ppo_loss")
    if str(session.spec) != spec:
        raise RuntimeError(f"its loss function holds {session.spec}, not {spec}")
    if session.spec.needs_exact:
        session.reference = _reference(process)
    session.confirmed, session.behaviour = True, behaviour
    actor = session.loss_fn.keywords["config"]
    used = [patch for patch in PATCHES.patches if patch.module.startswith("verl.workers")]
    return Receipt(
        rank=int(process.rank),
        world_size=int(process.world_size),
        host="veRL",
        host_version=version("verl"),
        patches=tuple(dict.fromkeys(patch.qualname for patch in used)),
        fingerprint=PATCHES.fingerprint(used),
        spec=str(session.spec),
        target=session.spec.target,
        behaviour=behaviour,
        cost=cost(session.spec),
        aggregation=str(aggregation_of(actor, "loss")),
        caveats=(*caveats_with_source(session.spec, behaviour), *aggregation_caveats(actor, "loss")),
    )


def _reference(process: Any) -> Any:
    """The worker of this process that holds the reference model.

    Raises:
        RuntimeError: there is none, so its logits are out of reach.
    """
    for role in _roles(process):
        reference = getattr(role, "ref", None)
        if reference is not None:
            return reference
    raise RuntimeError(
        "it has no reference model beside the actor, and exact terms need its logits; use a sampled spec, such as "
        "k2@loss/is:token"
    )


def _roles(process: Any) -> list[Any]:
    held = [process]
    for name in ("worker_dict", "fused_worker_dict"):  # roles that share one process
        held += list((getattr(process, name, None) or {}).values())
    return held


def _sessions(process: Any) -> Iterator[tuple[Any, Session]]:
    for role in _roles(process):
        # A role that has an inner actor trains through that one.
        worker = getattr(role, "actor", None) or role
        session = session_of(worker)
        if session is not None:
            yield worker, session
