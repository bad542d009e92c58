"""Controllers that change beta, the coefficient of the KL term, during a run.

The state of a controller is a plain dict that the caller keeps. Each optimizer batch advances it once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ADAPTIVE_ERROR_LIMIT = 0.2
"""Limit of the relative error of the observed KL, as in arXiv 1909.08593 (Ziegler et al.), section 2.2."""

LARGEST_BETA = 1e6
"""Upper limit of beta under ``adaptive`` and ``dual``.

A controller whose target cannot be reached would raise beta without end. With this limit the loss stays finite, and the
log shows the value.
"""

LARGEST_OBSERVED = 10.0
"""Largest contribution of one token, in nats, to the KL that a controller observes.

The estimator k3 grows like exp(-u). Without a limit, a single token among 100,000 with u = -20 would determine the next
beta.
"""

State = dict[str, Any]
"""State of a controller: ``kind``, ``numbers``, ``step`` and ``beta``, all of types that JSON can hold."""


@dataclass(frozen=True)
class BetaSchedule:
    """The value of a spec's ``beta:`` option.

    Attributes:
        kind: a key of :data:`kl_plugins.spec.schedules.SCHEDULES`.
        numbers: the numbers of that schedule, in the order in which its form lists them.
    """

    kind: str
    numbers: tuple[float, ...]


def init(schedule: BetaSchedule | None, base_beta: float) -> State:
    """Return the initial state of a controller.

    ``adaptive`` is the controller of arXiv 1909.08593, section 2.2. ``dual`` is dual ascent on the constraint
    KL <= target.

    Args:
        schedule: the ``beta`` option of the spec; None keeps ``base_beta`` during the whole run.
        base_beta: the host's constant beta; ``adaptive`` and ``dual`` start from it.

    Returns:
        The state as a plain dict, which the host can write into its checkpoint as JSON. Its ``beta`` is the coefficient
        of the first optimizer batch.

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
    """Return the state of a controller after one more optimizer batch.

    Args:
        state: a state from :func:`init` or :func:`update`; it is not changed.
        kl: observed KL to the reference per token, in nats: the mean of min(k3, 10) over the response tokens of all
            ranks.
        n: number of responses in the batch that have at least one response token, over all ranks.

    Returns:
        The next state; its ``beta`` is the coefficient of the next optimizer batch.

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
        # Without the min, a batch that is larger than the horizon could make beta negative.
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
    """Compute the two sums from which a host obtains the observed KL, after adding each of them over all ranks.

    The observed KL is the first sum divided by the second one. :func:`update` takes it as ``kl``.

    Args:
        logp: (B, T) log-probs of the policy, nats, any float dtype.
        ref_logp: (B, T) log-probs of the reference, nats, any float dtype.
        mask: (B, T), True on response tokens.

    Returns:
        Two 0-d tensors (float32, or float64 for float64 input): the sum over response tokens of k3, limited to
        :data:`LARGEST_OBSERVED` nats per token, and the number of response tokens.
    """
    from kl_plugins.estimators import k3_value
    from kl_plugins.numerics import Limits, masked_difference
    from kl_plugins.spec.grammar import DEFAULT_BOUND

    u = masked_difference(logp.detach(), ref_logp.detach(), mask)
    limits = Limits.of(u.dtype, DEFAULT_BOUND)
    observed = k3_value(limits.linear(u), limits.exponent(u)).clamp_max(LARGEST_OBSERVED)
    return observed.sum(), mask.bool().sum().to(u.dtype)
