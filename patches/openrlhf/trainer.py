"""Hooks in OpenRLHF's trainer process, sync and async: receipts, controllers, penalties, metrics, checkpoints.

The experience maker runs in the same process: ``@reward`` and ``@advantage`` specs work there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kl_plugins.adapters import checkpoints, receipts
from kl_plugins.adapters.micro_batch import entered
from kl_plugins.adapters.observe import require_unregularised, warn_unobserved
from kl_plugins.adapters.openrlhf import ADAPTER, HOST, require_receipts
from kl_plugins.adapters.openrlhf.batch import check_rollout
from kl_plugins.adapters.openrlhf.config import spec_of, statement_of
from kl_plugins.adapters.openrlhf.observe import RolloutMeasurement, observation_of
from kl_plugins.adapters.openrlhf.refusals import require_processed
from kl_plugins.adapters.openrlhf.score import ScoreController, shaping
from kl_plugins.patches.engine.arguments import Function, arguments, replaced
from kl_plugins.patches.engine.patch import Hook
from kl_plugins.patches.openrlhf import HOOKS, MAKER, reference, worker
from kl_plugins.spec import KLSpec
from kl_plugins.spec.observation import Observation

ATTRIBUTE = "_kl_plugins"
"""Attribute of a trainer that holds its run; absent on a trainer without a spec, which then is stock OpenRLHF."""

MEASUREMENT = "_kl_plugins_measurement"
"""Attribute of an experience maker whose KL in the reward is observed."""

STATE_KEY = "kl_plugins"
"""Where spec and controllers lie in the client states of OpenRLHF's checkpoints."""


@dataclass
class TrainerRun:
    """Spec of one trainer, what it observes instead, and whether its workers have shown their receipts."""

    spec: KLSpec
    observation: Observation | None = None
    confirmed: bool = False


def run_of(trainer: Any) -> TrainerRun | None:
    """Return what the trainer runs, or None where it trains as stock OpenRLHF."""
    run: TrainerRun | None = vars(trainer).get(ATTRIBUTE)
    return run


def init(wrapped: Function, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Around ``BasePPOTrainer.__init__``: the checks once more, where the trainer runs."""
    settings = arguments(wrapped, args, kwargs)["strategy"].args
    spec, observation = ADAPTER.checked(settings), observation_of(settings)
    wrapped(*args, **kwargs)
    if observation is not None:
        setattr(trainer, ATTRIBUTE, TrainerRun(observation.measured, observation))
        _bind_hooks(trainer)
    elif spec is not None:
        trainer.kl_ctl = trainer.experience_maker.kl_ctl
        setattr(trainer, ATTRIBUTE, TrainerRun(spec))
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
    run = run_of(trainer)
    if run is None:
        return wrapped(*args, **kwargs)
    if run.observation is not None:
        require_receipts(trainer.actor_model_group, trainer.args)
        reference.require_recorders(trainer.experience_maker, run.spec, run.observation)
        run.confirmed = True
        states = wrapped(*args, **kwargs)
        require_unregularised(states.get(STATE_KEY), run.observation)
        return states
    if run.spec.placement == "loss":
        require_processed(trainer.vllm_engines, run.spec, trainer.args)
        require_receipts(trainer.actor_model_group, trainer.args)
        reference.require_recorders(trainer.experience_maker, run.spec)
    run.confirmed = True
    states = wrapped(*args, **kwargs)
    if states.get("global_step"):
        _restore(trainer, run, states.get(STATE_KEY))
    return states


def train_step(wrapped: Function, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around one rollout batch: a score spec's KL metrics go into the status that OpenRLHF logs."""
    run = run_of(trainer)
    if run is None:
        return wrapped(*args, **kwargs)
    if not run.confirmed:
        # The async trainer is asked for its states by remote call, which goes to Ray's copy and not through the hook.
        trainer.init_checkpoint_states()
    status, step = wrapped(*args, **kwargs)
    if isinstance(trainer.kl_ctl, ScoreController):
        status.update(trainer.kl_ctl.metrics.total())
    measurement = measurement_of(trainer.experience_maker)
    if measurement is not None:
        status.update(measurement.metrics.total())
    return status, step


def ppo_train(wrapped: Function, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around the update of all workers: what goes in must hold the penalty, what comes out the KL metrics."""
    run = run_of(trainer)
    if run is None:
        return wrapped(*args, **kwargs)
    if run.observation is not None:
        status = wrapped(*args, **kwargs)
        if trainer.args.algo.kl.use_loss and "policy_loss" in status and "kl/active" not in status:
            warn_unobserved(HOST.title, run.observation)
        return status
    if isinstance(trainer.kl_ctl, ScoreController) and trainer.kl_ctl.penalties:
        raise RuntimeError(
            f"kl-plugins: the penalty of {run.spec} was computed, but never reached the advantages; this trainer "
            "takes a path that kl-plugins does not know, and would train without the regulariser"
        )
    status = wrapped(*args, **kwargs)
    if run.spec.placement == "loss" and "policy_loss" in status and "kl/active" not in status:
        raise RuntimeError(
            f"kl-plugins: the workers' update returned no kl/ metrics, so {run.spec} was not applied in it"
        )
    return status


def init_maker(wrapped: Function, maker: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Around ``RemoteExperienceMaker.__init__``: the checks and the receipt; a score spec takes over the controller."""
    settings = arguments(wrapped, args, kwargs)["strategy"].args
    spec, observation = ADAPTER.checked(settings), observation_of(settings)
    wrapped(*args, **kwargs)
    if observation is not None and not settings.algo.kl.use_loss:
        statement, functions = statement_of(observation.measured, settings), HOOKS.summary([MAKER])
        receipts.announce(receipts.made(HOST, observation.measured, statement, functions, observation=observation))
        setattr(maker, MEASUREMENT, RolloutMeasurement(observation, settings))
    if spec is not None and spec.placement != "loss":
        receipts.announce(receipts.made(HOST, spec, statement_of(spec, maker.args), HOOKS.summary([MAKER])))
        maker.kl_ctl = ScoreController(spec, maker.kl_ctl)


def measurement_of(maker: Any) -> RolloutMeasurement | None:
    """Return what measures the KL in the rewards of an experience maker; None where nothing is observed there."""
    measurement: RolloutMeasurement | None = vars(maker).get(MEASUREMENT)
    return measurement


def make_experience(wrapped: Function, maker: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around the forward passes over a rollout batch, which end in the KL or in the numbers of ``top:``."""
    measurement = measurement_of(maker)
    if measurement is not None:
        measurement.begin(arguments(wrapped, args, kwargs)["samples_list"], float(maker.kl_ctl.value))
        with entered(measurement):
            return wrapped(*args, **kwargs)
    observation = observation_of(maker.args)
    if observation is not None:
        with reference.recorded(maker, observation.measured, observation) as asked:
            made = wrapped(*args, **kwargs)
        reference.collect(maker, observation.measured, made, asked, observation)
        return made
    spec = spec_of(maker.args)
    if spec is None:
        return wrapped(*args, **kwargs)
    if spec.placement == "loss":
        with reference.recorded(maker, spec) as asked:
            made = wrapped(*args, **kwargs)
        check_rollout(spec, maker.args, made)
        reference.collect(maker, spec, made, asked)
        return made
    control = maker.kl_ctl
    if not isinstance(control, ScoreController):
        raise RuntimeError(
            f"kl-plugins: the experience maker's controller was replaced ({type(control).__qualname__}), so {spec} "
            "would not be applied; set it before the maker is built, or leave it alone"
        )
    with shaping(control, arguments(wrapped, args, kwargs)["samples_list"]):
        return wrapped(*args, **kwargs)


def compute_advantages(wrapped: Function, maker: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around rewards, advantages and their normalisation; ``@advantage`` is subtracted after all of it."""
    control = maker.kl_ctl
    if not (isinstance(control, ScoreController) and control.penalties):
        return wrapped(*args, **kwargs)
    control.suppress_in_reward()
    experiences = wrapped(*args, **kwargs)
    control.subtract(experiences)
    return experiences


def save_logs_and_checkpoints(wrapped: Function, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around logging and the regular checkpoint: spec and controllers' state go into its client states."""
    due = arguments(wrapped, args, kwargs)["global_step"] % trainer.args.ckpt.save_steps == 0
    return _saving(wrapped, trainer, args, kwargs, due)


def save_best_checkpoint(wrapped: Function, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around the checkpoint of the best model: spec and controllers' state go into its client states."""
    return _saving(wrapped, trainer, args, kwargs, bool(arguments(wrapped, args, kwargs)["eval_metrics"]))


def _saving(wrapped: Function, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], due: bool) -> Any:
    run = run_of(trainer)
    if run is not None and run.observation is None and due:
        given = arguments(wrapped, args, kwargs)["client_states"]
        states = {} if given is None else given  # in place: OpenRLHF goes on with the same dict
        states[STATE_KEY] = _saved(trainer, run)
        args, kwargs = replaced(wrapped, args, kwargs, client_states=states)
    return wrapped(*args, **kwargs)


def _saved(trainer: Any, run: TrainerRun) -> dict[str, Any]:
    control, state = trainer.kl_ctl, None
    if isinstance(control, ScoreController):
        state = control.controller.saved()
    elif run.spec.beta is not None:
        state = _call(trainer.actor_model_group._actor_handlers[:1], worker.saved)[0]
    # OpenRLHF alone forgets what its adaptive controller has learnt.
    return {**checkpoints.record(run.spec, state), "host_value": float(_host_of(control).value)}


def _restore(trainer: Any, run: TrainerRun, saved: dict[str, Any] | None) -> None:
    control, state = trainer.kl_ctl, checkpoints.resumed(saved, run.spec)
    if saved is not None and "host_value" in saved and trainer.args.algo.kl.target:
        _host_of(control).value = saved["host_value"]
    if isinstance(control, ScoreController):
        control.controller.restore(state)
    elif run.spec.beta is not None:
        _call(trainer.actor_model_group._actor_handlers, worker.restore, state)


def _host_of(control: Any) -> Any:
    return control.host if isinstance(control, ScoreController) else control


def _call(workers: list[Any], function: Function, *args: Any) -> list[Any]:
    import ray

    found: list[Any] = ray.get([process.__ray_call__.remote(function, *args) for process in workers])
    return found
