"""What one policy worker carries while it trains under a ``@loss`` spec, beside what every host carries."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kl_plugins.adapters.metrics import Accumulator, warn_if_floored
from kl_plugins.adapters.openrlhf.batch import MicroBatch
from kl_plugins.adapters.openrlhf.exact import require_same_reference
from kl_plugins.adapters.session import Session


@dataclass
class WorkerSession(Session):
    """Spec, controller and metrics of one worker.

    Attributes:
        rounded: the models compute in 16 bits.
        metrics: of the micro-batches since the last report.
        copies: how many processes share each sequence.
    """

    rounded: bool = True
    metrics: Accumulator = field(default_factory=Accumulator)
    copies: int = 1
    _kl: Tensor | None = field(default=None, repr=False)
    _difference: Tensor | None = field(default=None, repr=False)

    def keep(self, batch: MicroBatch) -> None:
        """Keep the metrics of a micro-batch for the next report; nothing is read back from the device.

        Args:
            batch: whose term was computed.
        """
        assert batch.metrics is not None
        self.metrics.add(batch.metrics, batch.mask, self.applied)
        if self.observation is not None:  # OpenRLHF's own number stays
            self._kl = torch.zeros(2, dtype=torch.float64, device=batch.mask.device)
            return
        assert batch.kl is not None
        kl = torch.stack([batch.kl.double().masked_fill(~batch.mask, 0.0).sum(), batch.mask.sum().double()])
        self._kl = kl if self._kl is None else self._kl + kl

    def keep_difference(self, difference: Tensor) -> None:
        """Keep how far the reference here is from OpenRLHF's own in a micro-batch, for the next check.

        Args:
            difference: what :func:`~kl_plugins.adapters.openrlhf.exact.states_kl` gave.
        """
        difference = difference.double()[None] / self.copies
        self._difference = difference if self._difference is None else self._difference + difference

    def check_step(self) -> None:
        """Check the micro-batches of an optimizer step, just before the step, and advance beta.

        It is a collective of all policy workers, also of those that share a sequence: one that stopped alone would
        leave the others waiting.

        Raises:
            LogProbError: on all ranks; log-probs are not finite.
            BetaChangedError: on all ranks; OpenRLHF's coefficient was changed although the spec controls beta.
            RuntimeError: on all ranks; the reference of exact terms is not OpenRLHF's own.
        """

        def total(numbers: Tensor) -> Tensor:
            torch.distributed.all_reduce(numbers)
            return numbers

        difference, self._difference = self._difference, None
        *differences, tokens = self.check(total, difference)
        for summed in differences:
            require_same_reference(summed / max(tokens, 1.0), self.rounded, self.spec.top)

    def report(self) -> dict[str, float]:
        """Join what OpenRLHF logs of everything since the last report; a collective over all ranks.

        Returns:
            The ``kl/`` metrics. Unless the spec is observed, also the estimator's mean over all tokens as ``kl``, which
            ``--algo.kl.target`` reads. OpenRLHF's own number is that divided by the number of micro-batches under
            ``--train.dynamic_batch_enable``, and too large where micro-batches hold different numbers of tokens.
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
        return found if self.observation is not None else {**found, "kl": kl / max(tokens, 1.0)}
