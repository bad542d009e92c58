"""Control of beta over the run: explicit state, one update per optimizer batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ADAPTIVE_ERROR_LIMIT = 0.2
"""Ziegler et al. clip the relative error of the observed KL to this."""

LARGEST_BETA = 1e6
"""A controller that pushes in vain stops here: the loss stays finite, and the log shows it."""

LARGEST_OBSERVED = 10.0
"""A token counts at most this many nats in the KL that a controller observes.

k3 grows like exp(-u), so without a limit one token of 100,000 with u = -20 would decide the next beta alone.
"""

State = dict[str, Any]


@dataclass(frozen=True)
class BetaSchedule:
    """The ``beta:`` option: a kind and its numbers (see :data:`kl_plugins.spec.schedules.SCHEDULES`)."""

    kind: str
    numbers: tuple[float, ...]


def init(schedule: BetaSchedule | None, base_beta: float) -> State:
    """Start a controller.

    See arXiv 1909.08593, section 2.2, for ``adaptive``; ``dual`` is dual ascent on the constraint KL <= target.

    Args:
        schedule: the spec's ``beta`` option; None keeps ``base_beta`` for ever.
        base_beta: the host's own constant; where ``adaptive`` and ``dual`` start.

    Returns:
        A plain dict (JSON-safe, for the host's checkpoint) whose ``beta`` is the one to use now.

    Raises:
        ValueError: ``base_beta`` is negative or not finite, or ``adaptive`` would start from 0 and stay there.
    """
    if not math.isfinite(base_beta) or base_beta < 0:
        raise ValueError(f"beta must be finite and >= 0, not {base_beta}")
    if schedule is None:
        return {"kind": "constant", "numbers": [], "step": 0, "beta": base_beta}
    if schedule.kind == "adaptive" and base_beta == 0:
        raise ValueError("beta:adaptive multiplies the host's beta, which is 0; set it to a positive start value")
    beta = schedule.numbers[0] if schedule.kind in ("linear", "cosine") else base_beta
    return {"kind": schedule.kind, "numbers": list(schedule.numbers), "step": 0, "beta": beta}


def update(state: State, kl: float, n: int) -> State:
    """Advance a controller by one optimizer batch.

    Args:
        state: what :func:`init` or :func:`update` returned; it is not changed.
        kl: observed KL to the reference per token, in nats: token-weighted global mean of min(k3, 10).
        n: responses in the batch with at least one response token, over all ranks.

    Returns:
        The next state.

    Raises:
        ValueError: ``kl`` is not finite while beta depends on it, or ``n`` is negative.
    """
    kind, numbers, step = state["kind"], state["numbers"], state["step"] + 1
    beta = state["beta"]
    if n < 0:
        raise ValueError(f"n counts sequences and must be >= 0, not {n}")
    if kind in ("adaptive", "dual") and not math.isfinite(kl):
        raise ValueError(
            f"beta:{kind} was given an observed KL of {kl}; the policy or reference log-probs of this batch are not "
            "finite. Resume from the last checkpoint with a smaller learning rate, or use a constant beta."
        )
    if kind in ("linear", "cosine"):
        beta = _scheduled(kind, *numbers, step=step)
    elif kind == "adaptive":
        target, horizon = numbers
        error = min(max(kl / target - 1, -ADAPTIVE_ERROR_LIMIT), ADAPTIVE_ERROR_LIMIT)
        # min: one batch larger than the horizon must not turn beta negative.
        beta = min(beta * (1 + error * min(n / horizon, 1.0)), LARGEST_BETA)
    elif kind == "dual":
        target, learning_rate = numbers
        beta = min(max(0.0, beta + learning_rate * (kl - target)), LARGEST_BETA)
    elif kind != "constant":
        raise ValueError(f"unknown beta controller {kind!r}; this state was written by another version")
    return {**state, "step": step, "beta": beta}


def _scheduled(kind: str, start: float, end: float, length: float, *, step: int) -> float:
    progress = min(step / length, 1.0)
    if kind == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return start + (end - start) * progress


def observed_kl_sums(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What a host sums over ranks to observe the KL: sum of min(k3, 10) and number of tokens.

    Args:
        logp: (B, T) log-probs of the policy, nats.
        ref_logp: (B, T) log-probs of the reference, nats.
        mask: (B, T), True on response tokens.

    Returns:
        Two 0-d tensors (float32, or float64 for float64 input): sum over tokens of k3, each at most
        :data:`LARGEST_OBSERVED` nats, and the number of tokens.
    """
    from kl_plugins.estimators import k3_value
    from kl_plugins.numerics import Limits, masked_difference
    from kl_plugins.spec.grammar import DEFAULT_BOUND

    u = masked_difference(logp.detach(), ref_logp.detach(), mask)
    limits = Limits.of(u.dtype, DEFAULT_BOUND)
    observed = k3_value(limits.linear(u), limits.exponent(u)).clamp_max(LARGEST_OBSERVED)
    return observed.sum(), mask.bool().sum().to(u.dtype)
