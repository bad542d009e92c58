"""Beta over the run: the spec's controller, fed once per optimizer step with the KL of all ranks."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from kl_plugins.controllers import BetaSchedule, init, observed_kl_sums, update

logger = logging.getLogger(__name__)


class BetaControl:
    """Current beta, and the sums of the optimizer step that is under way.

    The host's own ``beta`` stays what the user set: it also switches the reference model on, and a schedule may pass 0.
    """

    def __init__(self, schedule: BetaSchedule | None, base: float) -> None:
        """Start at the schedule's beginning.

        Args:
            schedule: the spec's ``beta`` option.
            base: the host's own constant.
        """
        self.schedule, self.base = schedule, base
        self.restart()

    @property
    def value(self) -> float:
        """Beta to use now."""
        return float(self.state["beta"])

    def restart(self) -> None:
        """Forget everything observed."""
        self.state = init(self.schedule, self.base)
        self._sums: Tensor | None = None

    def observe(self, logp: Tensor, ref_logp: Tensor, mask: Tensor) -> None:
        """Add one training micro-batch, (B, T) each, to the step's observed KL."""
        if self.schedule is None:
            return
        kl, tokens = observed_kl_sums(logp, ref_logp, mask)
        sums = torch.stack([kl, tokens, torch.full_like(tokens, logp.shape[0])]).to(torch.float32)
        self._sums = sums if self._sums is None else self._sums + sums

    def step(self, accelerator: Any) -> None:
        """Advance after an optimizer step; every rank calls it and gets the same beta."""
        if self.schedule is None or self._sums is None:
            return
        kl, tokens, sequences = accelerator.reduce(self._sums, reduction="sum").tolist()
        self._sums = None
        self.state = update(self.state, kl / max(tokens, 1.0), int(sequences))

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Go on from a checkpoint's state; start anew, saying so, where it has none for this schedule."""
        self.restart()
        if self.schedule is None:
            return
        same = saved is not None and all(saved.get(key) == self.state[key] for key in ("kind", "numbers"))
        if saved is None or not same:
            logger.warning(
                "kl-plugins: the checkpoint holds no state of the beta controller %s; it starts anew at beta %g",
                self.schedule.kind, self.value,
            )  # fmt: skip
            return
        self.state = dict(saved)
