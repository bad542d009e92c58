"""Hooks in TRL's RLOO."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kl_plugins.adapters.trl import advantage, reward
from kl_plugins.adapters.trl.log_probs import OLD, REFERENCE, Scored
from kl_plugins.adapters.trl.loss import response_mask
from kl_plugins.adapters.trl.session import ADVANTAGE_PENALTY, BETA, PENALTY
from kl_plugins.patches.trl import shared
from kl_plugins.patches.trl.beta import substituted_beta
from kl_plugins.patches.trl.shared import log_of, micro_batch, session_of

post_init = partial(shared.check_then_post_init, "RLOO")


def init(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Around ``__init__``."""
    from trl.trainer.rloo_trainer import disable_gradient_checkpointing

    from kl_plugins.patches.trl.targets import RLOO_TRAINER

    shared.init_with_session("RLOO", RLOO_TRAINER, disable_gradient_checkpointing, wrapped, trainer, args, kwargs)


def generate_and_score(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around ``_generate_and_score_completions``: RLOO's own KL in the reward becomes the spec's, or nothing."""
    session = session_of(trainer)
    if session is None:
        return wrapped(*args, **kwargs)
    penalties: list[Tensor] = []
    host_beta = float(trainer.beta)
    beta = session.beta(host_beta)
    with session.recorder.recording() as calls:

        def product(host_kl: Tensor) -> Tensor:
            penalties.append(session.rollout_penalty(_scorer(trainer), host_beta))
            if session.spec.placement != "reward":
                return host_kl.new_zeros(())
            gathered: Tensor = trainer.accelerator.gather(reward.sequence_penalty(penalties[0]))
            return beta * gathered.to(host_kl)

        with substituted_beta(trainer, product):
            output = wrapped(*args, **kwargs)
    output[PENALTY] = penalties[0]
    output[OLD], output[REFERENCE] = calls[0].logp, calls[-1].logp
    if session.spec.placement == "advantage":
        output[ADVANTAGE_PENALTY] = beta * penalties[0]
    output[BETA] = torch.tensor(beta, dtype=torch.float64)
    return output


def compute_loss(wrapped: Any, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around ``_compute_loss``: under ``@advantage`` each token's penalty joins its sequence's advantage."""
    session = session_of(trainer)
    if session is None:
        return wrapped(*args, **kwargs)
    inputs = dict(micro_batch(args, kwargs))
    penalty = inputs.get(ADVANTAGE_PENALTY)
    # Held back until the policy's log-probs are there: code that reads it earlier fails instead of going without.
    advantages = inputs.pop("advantages") if penalty is not None else None

    def supply(scored: Scored) -> None:
        if penalty is not None and advantages is not None:
            inputs["advantages"] = advantage.per_sequence(advantages, penalty, scored.logp, response_mask(inputs))

    with session.recorder.recording(supply) as calls:
        result = wrapped(args[0] if args else kwargs["model"], inputs)
    session.finish_loss(inputs, calls[-1].logp, None, log_of(trainer), trainer.model.training, float(trainer.beta))
    return result


def _scorer(trainer: Any) -> Any:
    from trl.trainer.rloo_trainer import disable_gradient_checkpointing

    return shared.policy_scorer(trainer, disable_gradient_checkpointing)
