"""What one worker carries while it trains under a ``@loss`` spec."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kl_plugins.adapters.controller import BetaChangedError, Controller
from kl_plugins.adapters.log_probs import require_finite
from kl_plugins.adapters.verl.host import LOSS_BETA
from kl_plugins.adapters.verl.loss import MicroBatch
from kl_plugins.adapters.verl.metrics import worker_metrics
from kl_plugins.spec import KLSpec

Total = Callable[[Tensor], Tensor]
"""Sums a tensor over the data-parallel ranks; a collective."""


@dataclass
class Session:
    """Spec and controller of one worker's loss function.

    Attributes:
        spec: what the user named.
        loss_fn: veRL's loss function that it belongs to.
        controller: of beta.
        confirmed: the trainer has asked for this worker's receipt.
        behaviour: where the receipt says that the behaviour policy's log-probs come from.
        reference: veRL's worker that holds the reference model in this process, where the spec needs its logits.
    """

    spec: KLSpec
    loss_fn: Any
    controller: Controller
    confirmed: bool = False
    behaviour: str = "automatic"
    reference: Any = None
    _counts: Tensor | None = field(default=None, repr=False)
    _beta: float = 0.0
    _changed: BetaChangedError | None = None

    @classmethod
    def of(cls, spec: KLSpec, loss_fn: Any, config: Any) -> Session:
        """The session of a loss function that is new.

        Args:
            spec: what the user named.
            loss_fn: veRL's.
            config: veRL's actor config.
        """
        return cls(spec, loss_fn, Controller(spec.beta, float(config.kl_loss_coef), LOSS_BETA))

    def require_confirmed(self) -> None:
        """Raise before an update that no trainer has vouched for.

        Raises:
            RuntimeError: no trainer has asked for the receipt.
        """
        if not self.confirmed:
            raise RuntimeError(
                f"kl-plugins: this worker should train under {self.spec}, but its trainer never asked for receipts, so "
                "other workers may train without it. Either kl-plugins is missing where the trainer runs (install it "
                "on every node), or the trainer is not one of veRL's own: call "
                "kl_plugins.adapters.verl.require_receipts(worker_group, spec) before its first update"
            )

    def start_step(self) -> None:
        """Forget what an optimizer step that was broken off has left."""
        self._counts, self._changed = None, None
        self.controller.forget()

    def config_with_beta(self, config: Any) -> Any:
        """veRL's actor config with the current beta as its coefficient; the very same object without a schedule.

        veRL's coefficient is read each time, because a program may change it.
        """
        self._beta = self.controller.due(config.kl_loss_coef)
        try:
            self.controller.beta(config.kl_loss_coef)
        except BetaChangedError as error:  # raised by check(), on all ranks
            self._changed = error
        if self.controller.schedule is None:
            return config
        config = copy.copy(config)
        object.__setattr__(config, "kl_loss_coef", self._beta)  # veRL's dataclasses are frozen
        return config

    def finish(self, batch: MicroBatch, make: Callable[[str, float], Any]) -> dict[str, Any]:
        """Observe a micro-batch and give its metrics.

        Args:
            batch: whose term was computed.
            make: builds veRL's metric object; see :func:`kl_plugins.adapters.verl.metrics.worker_metrics`.
        """
        if batch.metrics is None or batch.observed is None or batch.not_finite is None:
            raise RuntimeError(f"kl-plugins: {batch.spec} was not computed")
        self.controller.observe(*batch.observed, batch.mask)
        self._counts = batch.not_finite if self._counts is None else self._counts + batch.not_finite
        return worker_metrics(batch.metrics, batch.mask, self._beta, make)

    def check(self, total: Total) -> None:
        """Look at everything that an optimizer step is made of, once its gradients are there; all ranks raise together.

        Args:
            total: sums six int64 over the ranks: the counts of each name, the response tokens, and whether the
                coefficient was changed.

        Raises:
            LogProbError: a log-prob that the spec needs is not finite, on any rank.
            BetaChangedError: veRL's coefficient was changed on any rank, and the spec controls beta itself.
            RuntimeError: no micro-batch has been computed under the spec.
        """
        if self._counts is None:
            raise RuntimeError(
                f"kl-plugins: veRL's engine took an optimizer step without computing its PPO loss, so {self.spec} was "
                "not applied; this engine is not known"
            )
        changed = torch.full_like(self._counts[:1], int(self._changed is not None))
        *counts, ranks = total(torch.cat([self._counts, changed])).tolist()
        if self._changed is not None:
            raise self._changed
        if ranks:
            raise BetaChangedError(
                f"kl-plugins: {LOSS_BETA} was changed during the run on {ranks} ranks, but the spec "
                f"{self.spec} controls beta itself; leave beta out of the spec, or {LOSS_BETA} alone"
            )
        require_finite(counts, self.spec)
        self._counts = None
