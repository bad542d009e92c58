"""Hooks in OpenRLHF's trainer process, sync and async: receipts, controllers, metrics, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kl_plugins.adapters import checkpoints
from kl_plugins.adapters.openrlhf.score import ScoreBeta
from kl_plugins.patches.arguments import Function, arguments, replaced
from kl_plugins.patches.openrlhf import worker
from kl_plugins.patches.openrlhf.cli import checked
from kl_plugins.patches.patch import Hook
from kl_plugins.spec import KLSpec

ATTRIBUTE = "_kl_plugins"
"""Attribute of a trainer that holds its session; absent on a trainer without a spec, which then is stock OpenRLHF."""

STATE_KEY = "kl_plugins"
"""Where spec and controllers lie in the client states of OpenRLHF's checkpoints."""


@dataclass
class TrainerSession:
    """Spec of one trainer, and whether its workers have shown their receipts."""

    spec: KLSpec
    confirmed: bool = False


def session_of(trainer: Any) -> TrainerSession | None:
    """The trainer's session, or None where it trains as stock OpenRLHF."""
    session: TrainerSession | None = vars(trainer).get(ATTRIBUTE)
    return session


def init(wrapped: Function, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Around ``BasePPOTrainer.__init__``: the checks once more, where the trainer runs; then its session."""
    spec = checked(arguments(wrapped, args, kwargs)["strategy"].args)
    wrapped(*args, **kwargs)
    if spec is not None:
        trainer.kl_ctl = trainer.experience_maker.kl_ctl
        setattr(trainer, ATTRIBUTE, TrainerSession(spec))
        _bind_hooks(trainer)


def _bind_hooks(trainer: Any) -> None:
    # OpenRLHF's trainers are Ray actors, and Ray gives the actor's class copies of the methods that it inherits. They
    # were made while the module was imported, before the hooks went in, and would bypass them.
    for owner in type(trainer).__mro__:
        for name, hook in vars(owner).items():
            if isinstance(hook, Hook) and name not in vars(trainer) and not name.startswith("__"):
                vars(trainer)[name] = hook.__get__(trainer, type(trainer))


def init_checkpoint_states(wrapped: Function, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around the first thing that training does, before any rollout: receipts, then spec and state of a checkpoint."""
    session = session_of(trainer)
    if session is None:
        return wrapped(*args, **kwargs)
    if session.spec.placement == "loss":
        # Imported here: it needs Ray.
        from kl_plugins.adapters.openrlhf.receipts import collect, require_processed

        require_processed(trainer.vllm_engines, session.spec, trainer.args)
        collect(trainer.actor_model_group, session.spec, trainer.args)
    session.confirmed = True
    states = wrapped(*args, **kwargs)
    if states.get("global_step"):
        _restore(trainer, session, states.get(STATE_KEY))
    return states


def train_step(wrapped: Function, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around one rollout batch: a score spec's KL metrics go into the status that OpenRLHF logs."""
    session = session_of(trainer)
    if session is None:
        return wrapped(*args, **kwargs)
    if not session.confirmed:
        # The async trainer is asked for its states by remote call, which goes to Ray's copy and not through the hook.
        trainer.init_checkpoint_states()
    status, step = wrapped(*args, **kwargs)
    if isinstance(trainer.kl_ctl, ScoreBeta):
        status.update(trainer.kl_ctl.metrics.total())
    return status, step


def ppo_train(wrapped: Function, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around the update of all workers: what goes in must hold the penalty, what comes out the KL metrics."""
    session = session_of(trainer)
    if session is None:
        return wrapped(*args, **kwargs)
    if isinstance(trainer.kl_ctl, ScoreBeta) and trainer.kl_ctl.pending:
        raise RuntimeError(
            f"kl-plugins: the penalty of {session.spec} was computed, but never reached the advantages; this trainer "
            "takes a path that kl-plugins does not know, and would train without the regulariser"
        )
    status = wrapped(*args, **kwargs)
    if session.spec.placement == "loss" and "policy_loss" in status and "kl/active" not in status:
        raise RuntimeError(
            f"kl-plugins: the workers' update returned no kl/ metrics, so {session.spec} was not applied in it"
        )
    return status


def save_logs_and_checkpoints(wrapped: Function, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around logging and the regular checkpoint: spec and controllers' state go into its client states."""
    named = arguments(wrapped, args, kwargs)
    if session_of(trainer) is not None and named["global_step"] % trainer.args.ckpt.save_steps == 0:
        states = _with_state(trainer, named["client_states"])
        args, kwargs = replaced(wrapped, args, kwargs, client_states=states)
    return wrapped(*args, **kwargs)


def save_best_checkpoint(wrapped: Function, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The same around the checkpoint of the best model."""
    named = arguments(wrapped, args, kwargs)
    if session_of(trainer) is not None and named["eval_metrics"]:
        states = _with_state(trainer, named["client_states"])
        args, kwargs = replaced(wrapped, args, kwargs, client_states=states)
    return wrapped(*args, **kwargs)


def _with_state(trainer: Any, client_states: dict[str, Any] | None) -> dict[str, Any]:
    states = {} if client_states is None else client_states  # in place: OpenRLHF goes on with the same dict
    session = session_of(trainer)
    if session is not None:
        states[STATE_KEY] = _saved(trainer, session)
    return states


def _saved(trainer: Any, session: TrainerSession) -> dict[str, Any]:
    control, state = trainer.kl_ctl, None
    if isinstance(control, ScoreBeta):
        state = control.control.saved()
    elif session.spec.beta is not None:
        state = _call(trainer.actor_model_group._actor_handlers[:1], worker.saved)[0]
    # OpenRLHF alone forgets what its adaptive controller has learnt.
    return {**checkpoints.record(session.spec, state), "host_value": float(_host_of(control).value)}


def _restore(trainer: Any, session: TrainerSession, saved: dict[str, Any] | None) -> None:
    control, state = trainer.kl_ctl, checkpoints.resumed(saved, session.spec)
    if saved is not None and "host_value" in saved and trainer.args.algo.kl.target:
        _host_of(control).value = saved["host_value"]
    if isinstance(control, ScoreBeta):
        control.control.restore(state)
    elif session.spec.beta is not None:
        _call(trainer.actor_model_group._actor_handlers, worker.restore, state)


def _host_of(control: Any) -> Any:
    return control.host if isinstance(control, ScoreBeta) else control


def _call(workers: list[Any], function: Function, *args: Any) -> list[Any]:
    import ray

    found: list[Any] = ray.get([process.__ray_call__.remote(function, *args) for process in workers])
    return found
