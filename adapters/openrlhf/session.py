"""What one policy worker carries while it trains under a ``@loss`` spec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kl_plugins.adapters.beta import LossBeta, restored
from kl_plugins.adapters.openrlhf.loss import MicroBatch
from kl_plugins.adapters.openrlhf.metrics import Accumulator
from kl_plugins.spec import KLSpec


@dataclass
class Session:
    """Spec, controller and metrics of one worker.

    Attributes:
        spec: what the user named.
        beta: the spec's controller.
        confirmed: the trainer has asked for this worker's receipt.
        metrics: of the micro-batches since the last report.
        reference: gives the reference's logits, where the spec needs them.
    """

    spec: KLSpec
    beta: LossBeta
    confirmed: bool = False
    metrics: Accumulator = field(default_factory=Accumulator)
    reference: Callable[[Any], Tensor] | None = None

    def require_confirmed(self) -> None:
        """Raise before an update that no trainer has vouched for.

        Raises:
            RuntimeError: nobody asked for the receipt.
        """
        if not self.confirmed:
            raise RuntimeError(
                f"kl-plugins: this worker should train under {self.spec}, but its trainer never asked for receipts, so "
                "other workers may train without it. Either kl-plugins is missing where the trainer runs (install it "
                "on every node), or the trainer is not one of OpenRLHF's own: call "
                "kl_plugins.adapters.openrlhf.require_receipts(actor_group, args) before its first update"
            )

    def coefficient(self, host: float) -> float:
        """Beta to use now: the spec's schedule, else what OpenRLHF's controller says."""
        return host if self.spec.beta is None else self.beta.value

    def finish(self, batch: MicroBatch, beta: float) -> None:
        """Observe the KL of a micro-batch and keep its metrics.

        Args:
            batch: whose term was computed.
            beta: the coefficient it was multiplied with.
        """
        if batch.metrics is None or batch.observed is None:
            raise RuntimeError(f"kl-plugins: {batch.spec} was not computed")
        self.beta.observe(*batch.observed, batch.mask)
        self.metrics.add(batch.metrics, batch.mask, beta)

    def saved(self) -> dict[str, Any]:
        """The controller's state for a checkpoint."""
        return dict(self.beta.state)

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Go on from a checkpoint's state."""
        self.beta.state = restored(self.beta.state, saved, self.spec.beta)
