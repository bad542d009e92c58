"""Hooks in TRL's GRPO."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kl_plugins.adapters.micro_batch import current
from kl_plugins.adapters.trl.batch import response_mask
from kl_plugins.adapters.trl.config import by_sequence
from kl_plugins.adapters.trl.score import COLUMN, Rollout, task_reward, with_column, with_weight, written_by_policy
from kl_plugins.patches.engine.instead import instead
from kl_plugins.patches.trl.trainer import (
    log_of,
    model_of,
    observed_rollout,
    observing,
    recording,
    reference_scored,
    rolling_out,
    session_of,
    substituted_beta,
    updating,
)


def compute_loss(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hook around ``_compute_loss``: the product of beta and TRL's KL becomes the spec's term, or nothing for scores.

    TRL does the rest with it: masking, aggregation by loss type, gradient accumulation.
    """
    session = session_of(trainer)
    if session is None:
        return wrapped(*args, **kwargs)
    if session.observation is not None:
        return observing(wrapped, trainer, session, args, kwargs)
    updated = updating(trainer, session, args, kwargs, averaged=True)
    with updated as batch, substituted_beta(trainer, batch.times_beta):
        return wrapped(model_of(args, kwargs), batch.inputs)


def generate_and_score(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hook around ``_generate_and_score_completions``: a reward's penalty enters inside it, an advantage's after it.

    Under a ``@loss`` spec with ``top:``, the pass of the reference is recorded here for the updates.
    """
    session = session_of(trainer)
    if session is None:
        return wrapped(*args, **kwargs)
    if session.observation is not None:
        return observed_rollout(wrapped, trainer, session, args, kwargs)
    if session.spec.placement == "loss":
        if session.spec.top is None:
            with reference_scored(trainer):
                return wrapped(*args, **kwargs)
        with recording(session) as recorded, reference_scored(trainer):
            output = wrapped(*args, **kwargs)
        return recorded.keep(output)
    with rolling_out(trainer, session) as rollout, reference_scored(trainer):
        if session.spec.placement == "reward":
            with _reward_column(trainer, rollout), _tool_mask_noted(trainer, rollout):
                output = wrapped(*args, **kwargs)
        else:
            output = wrapped(*args, **kwargs)
            # TRL's tool mask is known only now, so the recorded attention mask is not enough.
            rollout.charge(response_mask(output))
            rollout.into_advantages(output, by_sequence(trainer.args))
    return rollout.keep(output)


def calculate_rewards(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hook around ``_calculate_rewards``: under ``@reward`` the penalty is one more reward, weighted by beta."""
    rewards = wrapped(*args, **kwargs)
    rollout = current(Rollout)
    if rollout is None or rollout.session is not session_of(trainer) or rollout.session.spec.placement != "reward":
        return rewards
    penalty = rollout.gathered()
    rollout.task = task_reward(rewards, trainer.reward_weights)
    # From here on TRL weighs, sums and logs one reward more; restored when the rollout is done.
    trainer.reward_weights = with_weight(trainer.reward_weights, rollout.beta)
    trainer.reward_func_names = [*trainer.reward_func_names, COLUMN]
    return with_column(rewards, penalty)


@contextmanager
def _reward_column(trainer: Any, rollout: Rollout) -> Iterator[None]:
    """Within the block, rewards carry the KL column; TRL's ``reward`` metric stays that of the task, as in RLOO."""
    weights, names = trainer.reward_weights, trainer.reward_func_names
    try:
        yield
    finally:
        trainer.reward_weights, trainer.reward_func_names = weights, names
    if rollout.task is None:
        raise RuntimeError(
            f"kl-plugins: {type(trainer).__name__} computed no rewards, so {rollout.session.spec} had no effect"
        )
    log = log_of(trainer)
    log["reward"][-1], log["reward_std"][-1] = rollout.task


@contextmanager
def _tool_mask_noted(trainer: Any, rollout: Rollout) -> Iterator[None]:
    """Within the block, the tool mask is noted where TRL generates: where it computes rewards, it does not show it.

    The method of a subclass is noted as well.
    """
    own = trainer._generate
    external = bool(getattr(trainer, "tools", None))

    def generate(*args: Any, **kwargs: Any) -> Any:
        generated = own(*args, **kwargs)
        rollout.written = written_by_policy(generated, required=external)
        return generated

    with instead(trainer, "_generate", generate):
        yield
