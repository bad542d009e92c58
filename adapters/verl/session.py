"""What one worker carries while it trains under a ``@loss`` spec."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kl_plugins.adapters.beta import LossBeta
from kl_plugins.adapters.verl.loss import MicroBatch, refuse_unknown, unknown_tokens, weighs_by_sampler
from kl_plugins.adapters.verl.metrics import worker_metrics
from kl_plugins.spec import KLSpec


@dataclass
class Session:
    """Spec and controller of one worker's loss function.

    Attributes:
        spec: what the user named.
        loss_fn: veRL's loss function that it belongs to.
        beta: current coefficient.
        confirmed: the trainer has asked for this worker's receipt.
        behaviour: where the receipt says that the behaviour policy's log-probs come from.
        reference: veRL's worker that holds the reference model in this process, where the spec needs its logits.
        sampler_usable: all of the sampler's log-probs in the present optimizer step are finite, on every rank.
    """

    spec: KLSpec
    loss_fn: Any
    beta: LossBeta
    confirmed: bool = False
    behaviour: str = "automatic"
    reference: Any = None
    sampler_usable: bool = True

    def require_confirmed(self) -> None:
        """Raise before an update that no trainer has vouched for.

        Raises:
            RuntimeError: nobody asked for the receipt.
        """
        if not self.confirmed:
            raise RuntimeError(
                f"kl-plugins: this worker should train under {self.spec}, but its trainer never asked for "
                "receipts, so other "
                "workers may train without it. Either kl-plugins is missing where the trainer runs (install it "
                "on every node), "
                "or the trainer is not one of veRL's own: call "
                "kl_plugins.adapters.verl.require_receipts(worker_group, spec) "
                "before its first update"
            )

    def check_sampler(self, data: Any, total: Callable[[list[int]], list[int]]) -> None:
        """Look at the sampler's log-probs of an optimizer step; one rank alone must not stop, or the others would hang.

        Args:
            data: this rank's mini-batch.
            total: sums numbers over all ranks; a collective.

        Raises:
            ValueError: weights are asked for that are unknown on some rank.
        """
        unknown, tokens = total(list(unknown_tokens(data)))
        self.sampler_usable = unknown == 0
        if weighs_by_sampler(self.spec, self.behaviour):
            refuse_unknown(self.spec, unknown, tokens)

    def config_with_beta(self, config: Any) -> Any:
        """veRL's actor config with the current beta as its coefficient; the very same object where beta is constant."""
        if self.beta.schedule is None:
            return config
        config = copy.copy(config)
        object.__setattr__(config, "kl_loss_coef", self.beta.value)  # veRL's dataclasses are frozen
        return config

    def finish(self, batch: MicroBatch, make: Callable[[str, float], Any]) -> dict[str, Any]:
        """Observe the KL of a micro-batch and give its metrics.

        Args:
            batch: whose term was computed.
            make: builds veRL's metric object; see :func:`kl_plugins.adapters.verl.metrics.worker_metrics`.
        """
        if batch.metrics is None or batch.observed is None:
            raise RuntimeError(f"kl-plugins: {batch.spec} was not computed")
        if torch.is_grad_enabled():
            self.beta.observe(*batch.observed, batch.mask)
        return worker_metrics(batch.metrics, float(batch.mask.sum()), self.beta.value, make)
