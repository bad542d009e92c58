"""Hooks in TRL's GRPO."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kl_plugins.adapters.trl import advantage, reward
from kl_plugins.adapters.trl.loss import response_mask
from kl_plugins.adapters.trl.session import PENALTY, Session
from kl_plugins.patches.trl import shared
from kl_plugins.patches.trl.beta import substituted_beta
from kl_plugins.patches.trl.shared import log_of, micro_batch, session_of

post_init = partial(shared.check_then_post_init, "GRPO")


def init(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Around ``__init__``."""
    from trl.trainer.grpo_trainer import disable_gradient_checkpointing

    from kl_plugins.patches.trl.targets import GRPO_TRAINER

    shared.init_with_session("GRPO", GRPO_TRAINER, disable_gradient_checkpointing, wrapped, trainer, args, kwargs)


def compute_loss(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around ``_compute_loss``: the product of beta and TRL's KL becomes the spec's term, or nothing for scores.

    TRL does the rest with it: masking, aggregation by loss type, gradient accumulation.
    """
    session = session_of(trainer)
    if session is None:
        return wrapped(*args, **kwargs)
    inputs = micro_batch(args, kwargs)
    found: list[dict[str, Tensor]] = []
    with session.recorder.recording() as calls, shared.watching_states(session, inputs) as states:

        def product(host_kl: Tensor) -> Tensor:
            if session.is_score:
                return host_kl.new_zeros(())
            exact = shared.exact_of(session, states, calls[-1])
            loss, metrics = session.beta_times_loss(inputs, calls[-1].logp, host_kl, exact)
            found.append(metrics)
            return loss

        with substituted_beta(trainer, product):
            result = wrapped(*args, **kwargs)
    logp = calls[-1].logp
    session.finish_loss(inputs, logp, found[0] if found else None, log_of(trainer), trainer.model.training)
    return result


def generate_and_score(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around ``_generate_and_score_completions``: the penalty enters after (advantage) or inside (reward) it."""
    session = session_of(trainer)
    if session is None or not session.is_score:
        return wrapped(*args, **kwargs)
    with session.recorder.recording():
        if session.spec.placement == "reward":
            with _reward_column(trainer, session) as penalties:
                output = wrapped(*args, **kwargs)
            penalty = penalties[0]
        else:
            output = wrapped(*args, **kwargs)
            # TRL's tool mask is known only now, so the recorded attention mask is not enough.
            penalty = session.rollout_penalty(_scorer(trainer), response_mask(output))
            output["advantages"] = advantage.per_token(output["advantages"], penalty, session.beta.value)
    output[PENALTY] = penalty
    return output


def calculate_rewards(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around ``_calculate_rewards``: under ``@reward`` the penalty is one more reward, weighted by beta."""
    rewards = wrapped(*args, **kwargs)
    session = session_of(trainer)
    pending = vars(trainer).get(_PENDING)
    if session is None or pending is None:
        return rewards
    penalty = session.rollout_penalty(_scorer(trainer))
    pending.penalties.append(penalty)
    pending.task = reward.task_reward(rewards, trainer.reward_weights)
    # From here on TRL weighs, sums and logs one reward more; restored when the rollout is done.
    beta = torch.tensor([session.beta.value], dtype=trainer.reward_weights.dtype, device=trainer.reward_weights.device)
    trainer.reward_weights = torch.cat([trainer.reward_weights, beta])
    trainer.reward_func_names = [*trainer.reward_func_names, reward.COLUMN]
    return reward.with_column(rewards, trainer.accelerator.gather(reward.sequence_penalty(penalty)))


_PENDING = "_kl_plugins_rewards"


class _Pending:
    def __init__(self) -> None:
        self.penalties: list[Tensor] = []
        self.task: tuple[float, float] | None = None


@contextmanager
def _reward_column(trainer: Any, session: Session) -> Iterator[list[Tensor]]:
    """Within the block, rewards carry the KL column; TRL's ``reward`` metric stays that of the task, as in RLOO."""
    weights, names = trainer.reward_weights, trainer.reward_func_names
    pending = _Pending()
    setattr(trainer, _PENDING, pending)
    try:
        yield pending.penalties
    finally:
        trainer.reward_weights, trainer.reward_func_names = weights, names
        delattr(trainer, _PENDING)
    if pending.task is None:
        raise RuntimeError(f"kl-plugins: {type(trainer).__name__} computed no rewards, so {session.spec} had no effect")
    log = log_of(trainer)
    log["reward"][-1], log["reward_std"][-1] = pending.task


def _scorer(trainer: Any) -> Any:
    from trl.trainer.grpo_trainer import disable_gradient_checkpointing

    return shared.policy_scorer(trainer, disable_gradient_checkpointing)
