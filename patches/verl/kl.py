"""Hooks around veRL's KL function and around what shapes rewards and advantages; all pass native names through."""

from __future__ import annotations

from typing import Any

from kl_plugins.adapters.micro_batch import current
from kl_plugins.adapters.verl import score
from kl_plugins.adapters.verl.beta import ScoreBeta
from kl_plugins.adapters.verl.host import SCORE_KEY
from kl_plugins.adapters.verl.settings import spec_in
from kl_plugins.patches.arguments import Function, arguments
from kl_plugins.spec import looks_like_spec


def kl_penalty(wrapped: Function, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around ``kl_penalty(logprob, ref_logprob, kl_penalty)``: a spec gets its own term."""
    named = arguments(wrapped, args, kwargs)
    text = named["kl_penalty"]
    if not looks_like_spec(text):
        return wrapped(*args, **kwargs)
    batch = current()
    if batch is not None:
        return batch.term(named["logprob"], named["ref_logprob"])
    kl = score.current.get()
    if kl is not None:
        return kl
    from kl_plugins.patches.verl.support import check_process

    check_process()
    raise RuntimeError(
        f"kl-plugins: {text} reached veRL's KL function from a place that kl-plugins does not know; a @loss spec "
        "works in veRL's ppo_loss, a @reward or @advantage spec in its apply_kl_penalty"
    )


def apply_kl_penalty(wrapped: Function, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around ``apply_kl_penalty(data, kl_ctrl, kl_penalty)``: the penalty, into rewards or towards advantages."""
    named = arguments(wrapped, args, kwargs)
    spec = spec_in(SCORE_KEY, named["kl_penalty"])
    if spec is None:
        return wrapped(*args, **kwargs)
    data, control = named["data"], named["kl_ctrl"]
    if not isinstance(control, ScoreBeta):
        raise RuntimeError(
            f"kl-plugins: {spec} is used by a trainer that kl-plugins has not checked; use one of veRL's own PPO "
            "trainers"
        )
    shaped, beta = score.shape(control, data.batch), control.value
    in_reward = spec.placement == "reward"
    token = score.current.set(shaped.kl)
    try:
        data, metrics = wrapped(data, control if in_reward else score.NoSubtraction(control), named["kl_penalty"])
    finally:
        score.current.reset(token)
    if not in_reward:
        score.hand_on(data, beta * shaped.penalty, control)
        metrics["actor/reward_kl_penalty_coeff"] = beta
    return data, {**metrics, **{key: value.item() for key, value in shaped.metrics.items()}, "kl/beta": beta}


def compute_advantage(wrapped: Function, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around the functions that end in final advantages; the outermost of them subtracts the penalty."""
    penalty = score.take_penalty(arguments(wrapped, args, kwargs)["data"])
    data = wrapped(*args, **kwargs)
    if penalty is not None:
        advantages = data.batch["advantages"]
        data.batch["advantages"] = advantages - penalty.to(advantages)
    return data
