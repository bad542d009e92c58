"""Hooks in veRL's trainers, the same for v0 and v1: checks, receipts, controllers, metrics, checkpoints."""

from __future__ import annotations

import sys
from collections.abc import MutableMapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kl_plugins.adapters.checkpoints import record, resumed
from kl_plugins.adapters.metrics import warn_if_floored
from kl_plugins.adapters.verl import guards, metrics, score
from kl_plugins.adapters.verl.beta import ScoreBeta, read_state, write_state
from kl_plugins.adapters.verl.settings import Specs, aggregation_caveats, aggregation_of, sampling_of, specs_of
from kl_plugins.patches.arguments import Function, arguments
from kl_plugins.receipts import Receipt
from kl_plugins.spec import KLSpec
from kl_plugins.spec.target import caveats_with_source

ATTRIBUTE = "_kl_plugins"
"""Attribute of a trainer that holds its session; absent on a trainer without a spec, which then is stock veRL."""

STATE_FILE = "kl_plugins.json"
"""The specs and the score controller's state, in the folder of a step's checkpoint."""


@dataclass
class TrainerSession:
    """Specs and score controller of one trainer."""

    specs: Specs
    score: ScoreBeta | None = None


def session_of(trainer: Any) -> TrainerSession | None:
    """The trainer's session, or None where it trains as stock veRL."""
    session: TrainerSession | None = vars(trainer).get(ATTRIBUTE)
    return session


def checked(config: Any) -> Specs:
    """The config's specs, after every check that needs no model and no Ray.

    Raises:
        KLSpecError: a text is not a valid spec.
        ValueError: a spec and other settings contradict each other.
        UnsupportedHostError: this veRL, or a part of it that the config picks, was not checked.
    """
    specs = specs_of(config)
    if specs:
        from kl_plugins.patches.verl import support

        support.check_process()
        support.check_sources()
        guards.check_config(specs, config)
        support.check_engine(config)
    return specs


def validate_config(wrapped: Function, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around veRL's own validation, in the launching process: a typo costs seconds."""
    checked(arguments(wrapped, args, kwargs)["config"])
    return wrapped(*args, **kwargs)


def init(wrapped: Function, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Around a trainer's ``__init__``: the checks once more, where the trainer runs; then its session."""
    config = arguments(wrapped, args, kwargs)["config"]
    specs = checked(config)
    wrapped(*args, **kwargs)
    if not specs:
        return
    from kl_plugins.patches.verl.support import check_trainer

    check_trainer(type(trainer))
    session = TrainerSession(specs)
    if specs.score is not None:
        adaptive = config.algorithm.kl_ctrl.type == "adaptive"
        session.score = trainer.kl_ctrl_in_reward = ScoreBeta(specs.score, trainer.kl_ctrl_in_reward, adaptive)
    setattr(trainer, ATTRIBUTE, session)


def init_workers(wrapped: Function, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around the start of all workers: receipts, before any rollout and any update."""
    result = wrapped(*args, **kwargs)
    session = session_of(trainer)
    if session is None:
        return result
    # Imported here: it needs Ray, and a config must be checked without.
    from kl_plugins.adapters.receipts import announce
    from kl_plugins.adapters.verl.receipts import collect

    if session.specs.loss is not None:
        source = guards.behaviour_source(session.specs.loss, trainer.config)
        collect(trainer.actor_rollout_wg, session.specs.loss, source, sampling_of(trainer.config))
    if session.specs.score is not None:
        announce(_score_receipt(session.specs.score, trainer.config))
    return result


def _score_receipt(spec: KLSpec, config: Any) -> Receipt:
    from kl_plugins.patches.verl.targets import PATCHES

    names = ("kl_penalty", "apply_kl_penalty", "compute_advantage", "compute_advantage_for_multi_trajectories")
    # The modules of other trainers need not be there.
    used = [patch for patch in PATCHES.patches if patch.qualname in names and patch.module in sys.modules]
    actor, sampling = config.actor_rollout_ref.actor, sampling_of(config)
    return Receipt(
        rank=0,
        world_size=1,
        host="veRL",
        host_version=version("verl"),
        patches=tuple(dict.fromkeys(patch.qualname for patch in used)),
        fingerprint=PATCHES.fingerprint(used),
        spec=str(spec),
        target=spec.target,
        behaviour="unused",
        reward_site=score.site(spec, config),
        aggregation=str(aggregation_of(actor, spec.placement)),
        sampling=str(sampling),
        caveats=(
            *caveats_with_source(spec, "unused"),
            *aggregation_caveats(actor, spec.placement),
            *sampling.caveats(spec, "unused"),
        ),
    )


def update_actor(wrapped: Function, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around the actor's update: what went in must hold the penalty, what comes out the KL metrics."""
    session = session_of(trainer)
    if session is None:
        return wrapped(*args, **kwargs)
    named = arguments(wrapped, args, kwargs)
    for spec in filter(None, session.specs):
        guards.check_sessions(spec, _keys(named["batch"]))
    if session.score is not None and session.score.pending:
        raise RuntimeError(
            f"kl-plugins: the penalty of {session.specs.score} was computed, but never reached the advantages; this "
            "trainer takes a path that kl-plugins does not know, and would train without the regulariser"
        )
    output = wrapped(*args, **kwargs)
    if session.specs.loss is not None:
        # v1 fills a dict that it was given, v0 returns one with its output.
        given = named.get("metrics")
        found: MutableMapping[str, Any] = output.meta_info["metrics"] if given is None else given
        if not metrics.finish(found, prefix="actor/"):
            raise RuntimeError(
                f"kl-plugins: the workers' update returned no kl/ metrics, so {session.specs.loss} was not "
                "applied in it"
            )
        warn_if_floored(session.specs.loss, found)
    return output


def _keys(batch: Any) -> list[str]:
    """The names of a v1 batch's rows; the older trainer has none, and one output per session."""
    keys = getattr(batch, "keys", None)
    return list(keys) if isinstance(keys, list) else []


def save_checkpoint(wrapped: Function, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around a trainer's checkpoint; the state goes first, because veRL marks the checkpoint as complete at its end."""
    session = session_of(trainer)
    if session is not None:
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
        state = resumed(read_state(folder / STATE_FILE), session.specs.text)
        if session.score is not None:
            session.score.restore(state)
    return result
