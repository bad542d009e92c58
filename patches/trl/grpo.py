"""Hooks in TRL's GRPO."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kl_plugins.adapters.trl import advantage, reward
from kl_plugins.adapters.trl.log_probs import Scored
from kl_plugins.adapters.trl.loss import response_mask
from kl_plugins.adapters.trl.session import ADVANTAGE_PENALTY, BETA, PENALTY, Session
from kl_plugins.patches.trl import shared
from kl_plugins.patches.trl.beta import reference_scored, substituted_beta
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
    inputs, supply = _with_penalty(micro_batch(args, kwargs))
    host_beta = float(trainer.beta)
    beta = session.beta(host_beta)
    found: list[dict[str, Tensor]] = []
    with session.recorder.recording(supply) as calls, shared.watching_states(session, inputs) as states:

        def product(host_kl: Tensor) -> Tensor:
            if session.is_score:
                return host_kl.new_zeros(())
            exact = session.exact_of(states, calls[-1])
            loss, metrics = session.beta_times_loss(inputs, calls[-1].logp, host_kl, beta, exact)
            found.append(metrics)
            return loss

        with substituted_beta(trainer, product):
            result = wrapped(args[0] if args else kwargs["model"], inputs)
    logp, log = calls[-1].logp, log_of(trainer)
    session.finish_loss(inputs, logp, found[0] if found else None, log, trainer.model.training, host_beta)
    return result


def _with_penalty(inputs: dict[str, Any]) -> tuple[dict[str, Any], Callable[[Scored], None] | None]:
    """The micro-batch, and what puts the penalty into its advantages where only the policy's log-probs make it."""
    penalty = inputs.get(ADVANTAGE_PENALTY)
    if penalty is None:
        return inputs, None
    inputs = dict(inputs)
    # Held back until the policy's log-probs are there: code that reads it earlier fails instead of going without.
    advantages = inputs.pop("advantages")

    def supply(scored: Scored) -> None:
        inputs["advantages"] = advantage.per_sequence(
            advantages, penalty, scored.logp, response_mask(inputs), averaged=True
        )

    return inputs, supply


def generate_and_score(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around ``_generate_and_score_completions``: the penalty enters after (advantage) or inside (reward) it."""
    session = session_of(trainer)
    if session is None:
        return wrapped(*args, **kwargs)
    host_beta = float(trainer.beta)
    beta = session.beta(host_beta)
    if not session.is_score:
        with reference_scored(trainer):
            return wrapped(*args, **kwargs)
    with reference_scored(trainer), session.recorder.recording():
        if session.spec.placement == "reward":
            with _reward_column(trainer, session, host_beta, beta) as penalties:
                output = wrapped(*args, **kwargs)
            penalty = penalties[0]
        else:
            output = wrapped(*args, **kwargs)
            # TRL's tool mask is known only now, so the recorded attention mask is not enough.
            penalty = session.rollout_penalty(_scorer(trainer), host_beta, response_mask(output))
            if advantage.by_sequence(trainer.args):
                output[ADVANTAGE_PENALTY] = beta * penalty
            else:
                output["advantages"] = advantage.per_token(output["advantages"], penalty, beta)
    output[PENALTY], output[BETA] = penalty, torch.tensor(beta, dtype=torch.float64)
    return output


def calculate_rewards(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around ``_calculate_rewards``: under ``@reward`` the penalty is one more reward, weighted by beta."""
    rewards = wrapped(*args, **kwargs)
    session = session_of(trainer)
    pending = vars(trainer).get(_PENDING)
    if session is None or pending is None:
        return rewards
    penalty = session.rollout_penalty(_scorer(trainer), pending.host_beta)
    pending.penalties.append(penalty)
    pending.task = reward.task_reward(rewards, trainer.reward_weights)
    # From here on TRL weighs, sums and logs one reward more; restored when the rollout is done.
    weights = trainer.reward_weights
    trainer.reward_weights = torch.cat([weights, torch.tensor([pending.beta], dtype=weights.dtype).to(weights.device)])
    trainer.reward_func_names = [*trainer.reward_func_names, reward.COLUMN]
    return reward.with_column(rewards, trainer.accelerator.gather(reward.sequence_penalty(penalty)))


_PENDING = "_kl_plugins_rewards"


class _Pending:
    def __init__(self, host_beta: float, beta: float) -> None:
        self.host_beta, self.beta = host_beta, beta
        self.penalties: list[Tensor] = []
        self.task: tuple[float, float] | None = None


@contextmanager
def _reward_column(trainer: Any, session: Session, host_beta: float, beta: float) -> Iterator[list[Tensor]]:
    """Within the block, rewards carry the KL column; TRL's ``reward`` metric stays that of the task, as in RLOO."""
    weights, names = trainer.reward_weights, trainer.reward_func_names
    pending = _Pending(host_beta, beta)
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
