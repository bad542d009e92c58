"""Beta over a run: it follows the spec's schedule or controller, or else the host's own coefficient."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kl_plugins.controllers import BetaSchedule, init, observed_kl_sums, update

logger = logging.getLogger(__name__)


class BetaChangedError(RuntimeError):
    """The host's coefficient was changed during a run whose spec controls beta."""


class Controller:
    """Gives beta to one trainer or worker.

    All ranks hold the same state, because all of them see the same reduced KL.

    Attributes:
        schedule: the spec's ``beta:`` option, or None.
        base: the host's coefficient at the start of the run.
        setting: name of the host's setting that holds the coefficient, for messages.
        state: the state of :mod:`kl_plugins.controllers`; plain data.
    """

    def __init__(self, schedule: BetaSchedule | None, base: float, setting: str) -> None:
        """Start at the beginning of the schedule.

        Args:
            schedule: the spec's ``beta:`` option; None keeps the host's coefficient, whatever it is at the time.
            base: the host's coefficient now.
            setting: name of the host's setting that holds it, for messages.
        """
        self.schedule, self.base, self.setting = schedule, float(base), setting
        self.restart()

    def restart(self) -> None:
        """Go back to the beginning of the schedule, and drop everything that was observed."""
        self.state = init(self.schedule, self.base)
        self._sums: Tensor | None = None

    def beta(self, host: float) -> float:
        """Return the coefficient to use now.

        Args:
            host: the host's coefficient now. Hosts and users may change it during a run.

        Raises:
            BetaChangedError: the host's coefficient has changed, and the spec's own ``beta:`` would ignore that.
        """
        if self.schedule is not None and self.forbids(host):
            raise BetaChangedError(
                f"kl-plugins: {self.setting} was changed from {self.base:g} to {float(host):g} during the run, but the "
                f"spec's beta:{self.schedule.kind} controls beta, so the change would be ignored. Leave beta out of "
                f"the spec to control it through {self.setting}, or leave {self.setting} alone"
            )
        return self.due(host)

    def forbids(self, host: float) -> bool:
        """Whether the host's coefficient has changed although the spec controls beta.

        Hosts that must raise on all ranks together ask this first, and call :meth:`beta` once the ranks have agreed.
        """
        return self.schedule is not None and float(host) != self.base

    def due(self, host: float) -> float:
        """Return the coefficient that :meth:`beta` gives, without its check."""
        return float(host if self.schedule is None else self.state["beta"])

    def observe(self, logp: Tensor, ref_logp: Tensor, mask: Tensor) -> None:
        """Add a training micro-batch to the observed KL of the current optimizer batch.

        Args:
            logp: (B, T) log-probs of the policy, nats.
            ref_logp: (B, T) log-probs of the reference, nats.
            mask: (B, T), True on response tokens.
        """
        if self.schedule is None:
            return
        mask = mask.bool()
        kl, tokens = observed_kl_sums(logp, ref_logp, mask)
        # The number of responses is counted in one way everywhere: those that have at least one response token.
        sums = torch.stack([kl, tokens, mask.any(-1).sum().to(kl)]).float()
        self._sums = sums if self._sums is None else self._sums + sums

    def observe_elsewhere(self, device: torch.device) -> None:
        """Take part in the sum over ranks without a micro-batch, because other processes compute the loss.

        Args:
            device: where the host's collectives take their tensors.
        """
        if self.schedule is not None:
            self._sums = torch.zeros(3, device=device)

    @property
    def observed(self) -> Tensor | None:
        """What this process has observed since the last step: (3,) KL in nats, tokens, responses; None if nothing."""
        return self._sums

    def forget(self) -> None:
        """Drop what was observed since the last step. A batch that is started again must not count twice."""
        self._sums = None

    def step(self, total: Callable[[Tensor], Tensor] | None = None) -> None:
        """Advance by one optimizer batch.

        Args:
            total: sums a (3,) tensor over the data-parallel ranks, a collective in which every rank takes part. None:
                this process sees the whole batch.
        """
        if self.schedule is None or self._sums is None:
            return
        sums, self._sums = self._sums, None
        kl, tokens, responses = (sums if total is None else total(sums)).tolist()
        self.state = update(self.state, kl / max(tokens, 1.0), int(responses))

    def saved(self) -> dict[str, Any]:
        """Return the state for a checkpoint; plain data."""
        return dict(self.state)

    def restore(self, saved: Mapping[str, Any] | None) -> None:
        """Continue from a checkpoint's state. If it holds none for this schedule, start again and log a warning."""
        self.restart()
        if self.schedule is None:
            return
        if saved is None or any(saved.get(key) != self.state[key] for key in ("kind", "numbers")):
            logger.warning(
                "kl-plugins: the checkpoint holds no state of the beta controller %s; it starts again at beta %g",
                self.schedule.kind, self.state["beta"],
            )  # fmt: skip
            return
        self.state = {key: saved[key] for key in self.state}
