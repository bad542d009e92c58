"""Hooks in TRL's RLOO."""

from __future__ import annotations

from typing import Any

from kl_plugins.patches.trl.trainer import (
    model_of,
    observing,
    recording,
    rolling_out,
    session_of,
    substituted_beta,
    updating,
)


def generate_and_score(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hook around ``_generate_and_score_completions``: RLOO's own KL in the reward becomes the spec's, or nothing."""
    session = session_of(trainer)
    if session is None:
        return wrapped(*args, **kwargs)
    if session.observation is not None:
        with recording(session) as recorded:
            output = wrapped(*args, **kwargs)
        return recorded.keep_log_probs(output)
    with rolling_out(trainer, session) as rollout, substituted_beta(trainer, rollout.times_beta):
        output = wrapped(*args, **kwargs)
    if session.spec.placement == "advantage":
        rollout.into_advantages(output, by_sequence=True)
    return rollout.keep(output, log_probs=True)


def compute_loss(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hook around ``_compute_loss``: under ``@advantage`` each token's penalty joins its sequence's advantage."""
    session = session_of(trainer)
    if session is None:
        return wrapped(*args, **kwargs)
    if session.observation is not None:
        return observing(wrapped, trainer, session, args, kwargs)
    with updating(trainer, session, args, kwargs, averaged=False) as batch:
        return wrapped(model_of(args, kwargs), batch.inputs)
