"""What one policy worker carries while it trains under a ``@loss`` spec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kl_plugins.adapters.controller import Controller
from kl_plugins.adapters.log_probs import NAMES, require_finite
from kl_plugins.adapters.metrics import Accumulator, warn_if_floored
from kl_plugins.adapters.openrlhf.exact import require_same_reference
from kl_plugins.spec import KLSpec

if TYPE_CHECKING:
    from kl_plugins.adapters.openrlhf.loss import MicroBatch


@dataclass
class Session:
    """Spec, controller and metrics of one worker.

    Attributes:
        spec: what the user named.
        beta: the controller.
        rounded: the models compute in 16 bits.
        confirmed: the trainer has asked for this worker's receipt.
        metrics: of the micro-batches since the last report.
        reference: gives the reference's logits, where the spec needs them.
        applied: the coefficient of the current micro-batch.
    """

    spec: KLSpec
    beta: Controller
    rounded: bool = True
    confirmed: bool = False
    metrics: Accumulator = field(default_factory=Accumulator)
    reference: Callable[[Any], Tensor] | None = None
    applied: float = 0.0
    _counts: Tensor | None = field(default=None, repr=False)
    _kl: Tensor | None = field(default=None, repr=False)

    def require_confirmed(self) -> None:
        """Raise before an update that no trainer has vouched for.

        Raises:
            RuntimeError: no trainer has asked for the receipt.
        """
        if not self.confirmed:
            raise RuntimeError(
                f"kl-plugins: this worker should train under {self.spec}, but its trainer never asked for receipts, so "
                "other workers may train without it. Either kl-plugins is missing where the trainer runs (install it "
                "on every node), or the trainer is not one of OpenRLHF's own: call "
                "kl_plugins.adapters.openrlhf.require_receipts(actor_group, args) before its first update"
            )

    def coefficient(self, host: float) -> float:
        """Beta of the micro-batch that begins now.

        Args:
            host: what OpenRLHF's controller says.

        Raises:
            BetaChangedError: it has changed although the spec controls beta. All ranks are passed the same value.
        """
        self.applied = self.beta.beta(host)
        return self.applied

    def take(self, batch: MicroBatch) -> None:
        """Keep what one micro-batch has computed; nothing is read back from the device.

        Args:
            batch: whose term has just been computed.
        """
        if batch.metrics is None or batch.observed is None or batch.not_finite is None or batch.kl is None:
            raise RuntimeError(f"kl-plugins: {batch.spec} was not computed")
        self.beta.observe(*batch.observed, batch.mask)
        self.metrics.add(batch.metrics, batch.mask, self.applied)
        counts = batch.not_finite.double()
        if batch.difference is not None:
            counts = torch.cat([counts, batch.difference.double()[None]])
        self._counts = counts if self._counts is None else self._counts + counts
        kl = torch.stack([batch.kl.double().masked_fill(~batch.mask, 0.0).sum(), batch.mask.sum().double()])
        self._kl = kl if self._kl is None else self._kl + kl

    @property
    def unchecked(self) -> bool:
        """Whether there are micro-batches that :meth:`before_step` has not seen."""
        return self._counts is not None

    def before_step(self, group: Any) -> None:
        """Check the micro-batches of an optimizer step on all ranks, just before the step, and advance beta.

        Ranks share their counts, and what the controller observed, in one small all-reduce.

        Args:
            group: process group of the data-parallel ranks; every one of them has to call this.

        Raises:
            LogProbError: on all ranks; log-probs are not finite.
            RuntimeError: on all ranks; the reference of exact terms is not OpenRLHF's own.
        """
        counts, self._counts = self._counts, None
        if counts is None:
            return
        observed = self.beta.observed
        packed = counts if observed is None else torch.cat([counts, observed.double()])
        torch.distributed.all_reduce(packed, group=group)
        numbers = packed[: len(counts)].tolist()
        unknown, difference = numbers[: len(NAMES) + 1], numbers[len(NAMES) + 1 :]
        # First: a controller that is given a NaN would raise as well, and say less about it.
        require_finite(unknown, self.spec)
        if difference:
            require_same_reference(difference[0] / max(unknown[-1], 1.0), self.rounded)
        self.beta.step(lambda _: packed[len(counts) :])

    def report(self) -> dict[str, float]:
        """What OpenRLHF logs of everything since the last report; a collective over all ranks.

        Returns:
            The ``kl/`` metrics; and as ``kl``, which ``--algo.kl.target`` reads, the estimator's mean over all tokens.
            OpenRLHF's own number is that divided by the number of micro-batches under ``--train.dynamic_batch_enable``,
            and too large where micro-batches hold different numbers of tokens.
        """
        packed, own = self.metrics.packed(), self._kl
        self._kl = None
        if packed is None or own is None:
            return {}
        sums, maxima = torch.cat([packed[0], own.to(packed[0])]), packed[1]
        torch.distributed.all_reduce(sums)
        torch.distributed.all_reduce(maxima, op=torch.distributed.ReduceOp.MAX)
        kl, tokens = sums[-2:].tolist()
        found = self.metrics.total((sums[:-2], maxima))
        if torch.distributed.get_rank() == 0:
            warn_if_floored(self.spec, found)
        return {**found, "kl": kl / max(tokens, 1.0)}
