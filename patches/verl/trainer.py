"""Hooks in veRL's trainer process, the same for v0 and v1: checks, receipts, scores, metrics, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kl_plugins.adapters import receipts
from kl_plugins.adapters.checkpoints import read_state, record, resumed, write_state
from kl_plugins.adapters.metrics import warn_if_floored
from kl_plugins.adapters.micro_batch import entered
from kl_plugins.adapters.observe import require_unregularised, warn_unobserved
from kl_plugins.adapters.top_k import KEY
from kl_plugins.adapters.verl import ADAPTER, HOST, SCORE_KEY, age, metrics, score
from kl_plugins.adapters.verl.config import Specs, behaviour_source, sampling_of, spec_in, statement_of
from kl_plugins.adapters.verl.observe import Observed, ScoreObservation, observation_of
from kl_plugins.adapters.verl.refusals import check_sessions, check_trainer
from kl_plugins.adapters.verl.score import ScoreController, Shaping
from kl_plugins.adapters.verl.session import collect, require_reference
from kl_plugins.adapters.verl.top_k import put_back
from kl_plugins.patches.engine.arguments import Function, arguments
from kl_plugins.patches.verl import HOOKS
from kl_plugins.spec import KLSpec

ATTRIBUTE = "_kl_plugins"
"""Attribute of a trainer that holds its session; a trainer without a spec has none and trains as veRL alone does."""

STATE_FILE = "kl_plugins.json"
"""File with the specs and the score controller's state, in the folder of a step's checkpoint."""

SCORE_FUNCTIONS = ("kl_penalty", "apply_kl_penalty", "compute_advantage", "compute_advantage_for_multi_trajectories")
"""Functions of veRL that a score spec works through."""


@dataclass
class TrainerSession:
    """What one trainer carries.

    Attributes:
        specs: of its config.
        score: the controller of a score spec.
        kept: under ``top:``, the reference's numbers of the present batch in the older trainer, (B, j) nested.
        observed: what the config asks to observe, or None.
    """

    specs: Specs
    score: ScoreController | None = None
    kept: Any = None
    observed: Observed | None = None

    @property
    def of_reference(self) -> KLSpec | None:
        """The spec with ``top:``, applied or observed in the loss, for which the reference's pass gives numbers."""
        spec = self.specs.loss
        if spec is None and self.observed is not None and self.observed.in_loss:
            spec = self.observed.observation.measured
        return spec if spec is not None and spec.top is not None else None


def session_of(trainer: Any) -> TrainerSession | None:
    """Return the trainer's session, or None where it trains as veRL alone does."""
    session: TrainerSession | None = vars(trainer).get(ATTRIBUTE)
    return session


def init(wrapped: Function, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Around a trainer's ``__init__``: the checks once more, where the trainer runs; then its session."""
    config = arguments(wrapped, args, kwargs)["config"]
    specs, observed = ADAPTER.checked(config), observation_of(config)
    wrapped(*args, **kwargs)
    _open_session(trainer, config, specs, observed)


def init_worker_groups(wrapped: Function, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around the start of the worker processes of veRL's experimental trainers, which replace what other trainers have.

    Their own ``__init__`` and ``init_workers`` never call those of veRL's trainer. One of the two classes is that of a
    Ray actor, which no module holds under its name. This method belongs to the class that both inherit from. At this
    point no model is loaded. The receipts come as soon as all models are, and before anything else.
    """
    config = trainer.config
    _open_session(trainer, config, ADAPTER.checked(config), observation_of(config))
    result = wrapped(*args, **kwargs)
    if session_of(trainer) is not None:
        load_models = trainer._init_models

        def load_models_and_ask() -> None:
            load_models()
            _require_receipts(trainer)

        trainer._init_models = load_models_and_ask
    return result


def _open_session(trainer: Any, config: Any, specs: Specs, observed: Observed | None) -> None:
    if not specs and observed is None:
        return
    check_trainer(type(trainer))
    session = TrainerSession(specs, observed=observed)
    if observed is not None and not observed.in_loss:
        # veRL's function for the KL in the reward gets this object, and not the trainer.
        setattr(trainer.kl_ctrl_in_reward, ATTRIBUTE, ScoreObservation.of(observed, config))
    if specs.score is not None:
        session.score = trainer.kl_ctrl_in_reward = ScoreController(specs.score, trainer.kl_ctrl_in_reward)
    setattr(trainer, ATTRIBUTE, session)


def init_workers(wrapped: Function, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around the start of all workers: receipts, before any rollout and any update."""
    result = wrapped(*args, **kwargs)
    _require_receipts(trainer)
    return result


def _require_receipts(trainer: Any) -> None:
    session = session_of(trainer)
    if session is None:
        return
    config, actor = trainer.config, trainer.config.actor_rollout_ref.actor
    if session.specs.loss is not None:
        source = behaviour_source(session.specs.loss, config)
        collect(trainer.actor_rollout_wg, session.specs.loss, source, sampling_of(config))
        if session.specs.loss.top is not None and trainer.ref_policy_wg is not trainer.actor_rollout_wg:
            require_reference(trainer.ref_policy_wg, session.specs.loss, source)
    observed = session.observed
    if observed is not None and observed.in_loss:
        source = behaviour_source(observed.observation.measured, config)
        collect(trainer.actor_rollout_wg, observed.observation, source, sampling_of(config))
        if session.of_reference is not None and trainer.ref_policy_wg is not trainer.actor_rollout_wg:
            require_reference(trainer.ref_policy_wg, observed.observation, source)
    elif observed is not None:
        measured = observed.observation.measured
        source, functions = behaviour_source(measured, config), HOOKS.summary(functions=SCORE_FUNCTIONS)
        site = score.site(measured, config) if measured.placement == "reward" else ""
        statement = statement_of(measured, actor, source, sampling_of(config), reward_site=site)
        receipts.announce(receipts.made(HOST, measured, statement, functions, observation=observed.observation))
    spec = session.specs.score
    if spec is not None:
        statement = statement_of(spec, actor, sampling=sampling_of(config), reward_site=score.site(spec, config))
        receipts.announce(receipts.made(HOST, spec, statement, HOOKS.summary(functions=SCORE_FUNCTIONS)))


def apply_kl_penalty(wrapped: Function, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around ``apply_kl_penalty(data, kl_ctrl, kl_penalty)``: the penalty, into rewards or towards advantages."""
    named = arguments(wrapped, args, kwargs)
    watching: ScoreObservation | None = getattr(named["kl_ctrl"], ATTRIBUTE, None)
    if watching is not None:
        measurement = watching.begin(named["data"].batch)
        beta = float(named["kl_ctrl"].value)
        with entered(measurement):
            data, found = wrapped(*args, **kwargs)
        return data, {**found, **measurement.found(beta)}
    spec = spec_in(SCORE_KEY, named["kl_penalty"])
    if spec is None:
        return wrapped(*args, **kwargs)
    control = named["kl_ctrl"]
    if not isinstance(control, ScoreController):
        raise RuntimeError(
            f"kl-plugins: {spec} is used by a trainer that kl-plugins has not checked; use one of veRL's own PPO "
            "trainers"
        )
    shaping = Shaping.of(control, named["data"].batch)
    with entered(shaping):
        data, found = wrapped(named["data"], shaping.subtracted(), named["kl_penalty"])
    return data, shaping.finish(data, found)


def compute_advantage(wrapped: Function, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around the functions that end in final advantages; the outermost of them subtracts the penalty."""
    penalty = score.take_penalty(arguments(wrapped, args, kwargs)["data"])
    data = wrapped(*args, **kwargs)
    score.subtract(data, penalty)
    return data


def update_actor(wrapped: Function, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around the actor's update: what went in must hold the penalty, what comes out the KL metrics."""
    session = session_of(trainer)
    if session is None:
        return wrapped(*args, **kwargs)
    named = arguments(wrapped, args, kwargs)
    for spec in filter(None, session.specs):
        check_sessions(spec, _keys(named["batch"]))
    if session.score is not None and session.score.pending:
        raise RuntimeError(
            f"kl-plugins: the penalty of {session.specs.score} was computed, but never reached the advantages; this "
            "trainer takes a path that kl-plugins does not know, and would train without the regulariser"
        )
    ages = age.ages_of(trainer, named["batch"])
    with _carrying(session, named["batch"]):
        output = wrapped(*args, **kwargs)
    # v1 fills a dict that it was given, v0 returns one with its output.
    given = named.get("metrics")
    found: MutableMapping[str, Any] = output.meta_info["metrics"] if given is None else given
    if session.specs.loss is not None:
        if not metrics.finish(found, prefix="actor/"):
            raise RuntimeError(
                f"kl-plugins: the workers' update returned no kl/ metrics, so {session.specs.loss} was not "
                "applied in it"
            )
        warn_if_floored(session.specs.loss, found)
    if session.observed is not None and session.observed.in_loss and not metrics.finish(found, prefix="actor/"):
        warn_unobserved(HOST.title, session.observed.observation)
    age.report(found, ages)
    return output


@contextmanager
def _carrying(session: TrainerSession, batch: Any) -> Iterator[None]:
    """Within the block, the older trainer's batch holds the reference's top-k numbers; only the actor gets them."""
    kept, session.kept = session.kept, None
    if kept is None:
        yield
        return
    put_back(batch, kept)
    try:
        yield
    finally:
        batch.batch.pop(KEY)


def _keys(batch: Any) -> list[str]:
    """The names of a v1 batch's rows; the older trainer has none, and one output per session."""
    keys = getattr(batch, "keys", None)
    return list(keys) if isinstance(keys, list) else []


def save_checkpoint(wrapped: Function, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around a trainer's checkpoint; the state goes first, because veRL marks the checkpoint as complete at its end."""
    session = session_of(trainer)
    if session is not None and session.specs:
        folder = Path(trainer.config.trainer.default_local_dir) / f"global_step_{trainer.global_steps}"
        state = None if session.score is None else session.score.saved()
        write_state(folder / STATE_FILE, record(session.specs.text, state))
    return wrapped(*args, **kwargs)


def load_checkpoint(wrapped: Function, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around a trainer's resume: other specs are refused before anything is trained."""
    result = wrapped(*args, **kwargs)
    session, step = session_of(trainer), getattr(trainer, "global_steps", 0)
    if session is not None and step:
        settings = trainer.config.trainer
        path = settings.resume_from_path if settings.resume_mode == "resume_path" else None
        folder = Path(path or Path(settings.default_local_dir) / f"global_step_{step}")
        saved = read_state(folder / STATE_FILE)
        if session.observed is not None and not session.specs:
            require_unregularised(saved, session.observed.observation)
            return result
        state = resumed(saved, session.specs.text)
        if session.score is not None:
            adaptive = trainer.config.algorithm.kl_ctrl.type == "adaptive"
            session.score.restore(state, host_value=adaptive)
    return result
