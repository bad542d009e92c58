"""Beta over the run, for hosts that compute the loss in many processes and shape rewards in one."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from kl_plugins.controllers import BetaSchedule, init, observed_kl_sums, update

logger = logging.getLogger(__name__)


class LossBeta:
    """Beta of one worker; every rank holds the same state, because all see the same reduced KL."""

    def __init__(self, schedule: BetaSchedule | None, base: float) -> None:
        """Start at the schedule's beginning.

        Args:
            schedule: the spec's ``beta`` option.
            base: the host's own constant.
        """
        self.schedule = schedule
        self.state = init(schedule, base)
        self._sums: Tensor | None = None

    @property
    def value(self) -> float:
        """Beta to use now."""
        return float(self.state["beta"])

    def observe(self, logp: Tensor, ref_logp: Tensor, mask: Tensor) -> None:
        """Add one training micro-batch, (B, T) each, to the observed KL of the optimizer step."""
        if self.schedule is None:
            return
        sums = observed_sums(logp, ref_logp, mask)
        self._sums = sums if self._sums is None else self._sums + sums

    def step(self, group: Any) -> None:
        """Advance after an optimizer step; a collective over the data-parallel ranks."""
        if self.schedule is None or self._sums is None:
            return
        sums, self._sums = self._sums, None
        if group is not None:
            torch.distributed.all_reduce(sums, group=group)
        kl, tokens, sequences = sums.tolist()
        self.state = update(self.state, kl / max(tokens, 1.0), int(sequences))


def observed_sums(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """What a controller sums up: k3 in nats, response tokens, and sequences that have any; (3,) float32.

    Args:
        logp: (B, T) log-probs of the policy, nats.
        ref_logp: (B, T) log-probs of the reference, nats.
        mask: (B, T), True on response tokens.
    """
    mask = mask.bool()
    kl, tokens = observed_kl_sums(logp, ref_logp, mask)
    return torch.stack([kl, tokens, mask.any(-1).sum().to(kl)]).float()


def restored(fresh: dict[str, Any], saved: dict[str, Any] | None, schedule: BetaSchedule | None) -> dict[str, Any]:
    """The saved state where it belongs to this schedule; else the fresh one, with a warning."""
    if schedule is None:
        return fresh
    if saved is None or any(saved.get(key) != fresh[key] for key in ("kind", "numbers")):
        logger.warning(
            "kl-plugins: the checkpoint holds no state of the beta controller %s; it starts anew at beta %g",
            schedule.kind, fresh["beta"],
        )  # fmt: skip
        return fresh
    return {key: saved[key] for key in fresh}
