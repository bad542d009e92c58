"""What one trainer carries while it trains under a spec, and its metrics in TRL's own log."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kl_plugins.adapters import session as shared
from kl_plugins.adapters.log_probs import require_finite
from kl_plugins.adapters.metrics import joined, sums_and_maxima, warn_if_floored
from kl_plugins.adapters.trl.exact import StateKL, require_head
from kl_plugins.adapters.trl.ranks import Found, Together, together
from kl_plugins.receipts import Receipt

if TYPE_CHECKING:
    from kl_plugins.adapters.trl.batch import Scored

_ALWAYS = "kl/active"


class Window:
    """What has been added up since TRL last logged, over micro-batches and ranks.

    TRL averages each list of its log when it logs, and empties the log afterwards. So each list holds one number, that
    of the whole window, and a log without it means that a new window has begun.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self._sums: dict[str, float] = {}
        self._maxima: dict[str, float] = {}

    def add(
        self, log: MutableMapping[str, list[float]], sums: Mapping[str, float], maxima: Mapping[str, float]
    ) -> dict[str, float]:
        """Add a micro-batch and put the window's metrics into TRL's log.

        Args:
            log: TRL's ``_metrics[mode]``.
            sums: totals over all ranks, see :func:`kl_plugins.adapters.metrics.sums_and_maxima`.
            maxima: the largest of all ranks.

        Returns:
            The metrics of the window before this one where a new one begins; else nothing.
        """
        ended: dict[str, float] = {}
        if not log.get(_ALWAYS) and self._sums:
            ended = joined(self._sums, self._maxima)
            self._sums, self._maxima = {}, {}
        for key, value in sums.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
        for key, value in maxima.items():
            self._maxima[key] = max(self._maxima.get(key, value), value)
        for key, value in joined(self._sums, self._maxima).items():
            log[key] = [value]
        return ended


@dataclass(kw_only=True)
class Session(shared.Session):
    """Spec, controller and records of one trainer.

    Other hosts sum over the ranks once before an optimizer step. TRL's log needs maxima as well, so here one gather per
    micro-batch carries the checks and the metrics: see :meth:`agree`.

    Attributes:
        accelerator: the trainer's.
        receipt: makes this process's receipt.
        score_policy: scores the tokens of a recorded call under the policy: one forward pass without gradient.
        states: source of full-vocabulary KLs, where the spec needs them.
        training: False in evaluation, which moves no controller.
        passed: our code that TRL has gone through since the last optimizer step (``loss``) or ever (``rollout``).
        deviation: how far log-probs computed for exact terms are from TRL's own, nats; 0 where they agree.
        windows: metrics since TRL last logged, in training and in evaluation.
    """

    accelerator: Any
    receipt: Callable[[], Receipt]
    score_policy: Callable[[Scored], Tensor]
    states: StateKL | None = None
    training: bool = True
    passed: set[str] = field(default_factory=set)
    deviation: float = 0.0
    windows: dict[bool, Window] = field(default_factory=lambda: {True: Window(), False: Window()})
    _host_beta: float = math.nan
    _shown: tuple[Tensor, ...] = ()

    @property
    def is_score(self) -> bool:
        """Whether the KL sits in the rewards or advantages, not in the loss."""
        return self.spec.placement != "loss"

    def coefficient(self, host: float) -> float:
        """Return the beta of the rollout or micro-batch that begins now; see the base class.

        Args:
            host: the trainer's ``beta`` now.
        """
        self._host_beta = float(host)
        return super().coefficient(host)

    def add(self, not_finite: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor) -> None:
        """Keep what one micro-batch has shown, until :meth:`conclude`. See the base class for the arguments."""
        self._counts, self._shown = not_finite, (logp, ref_logp, mask)

    def conclude(
        self, found: Mapping[str, Tensor], mask: Tensor, beta: float, log: MutableMapping[str, list[float]]
    ) -> None:
        """Check a micro-batch on all ranks together, and log its metrics.

        Args:
            found: the metrics of the micro-batch, 0-d tensors by key.
            mask: (B, T), True on response tokens.
            beta: the coefficient that was applied to this micro-batch.
            log: TRL's metrics of this mode.

        Raises:
            LogProbError: a log-prob that the spec needs is not finite, on any rank.
            BetaChangedError: the host's coefficient was changed against the spec's schedule, on any rank.
        """
        assert self._counts is not None
        agreed = self.agree(self._counts, *sums_and_maxima(found, mask, beta))
        ended = self.windows[self.training].add(log, agreed.sums, agreed.maxima)
        if self.training:
            if self.accelerator.is_main_process:
                warn_if_floored(self.spec, ended)
            self.controller.observe(*self._shown)
        self._shown = ()
        self.passed.add("loss")

    def agree(
        self,
        not_finite: Tensor,
        sums: Mapping[str, Tensor] | None = None,
        maxima: Mapping[str, Tensor] | None = None,
    ) -> Together:
        """Exchange what each rank found. If one of them found a reason to stop, all raise the same error.

        Args:
            not_finite: (5,) counts of :func:`kl_plugins.adapters.log_probs.count_not_finite`.
            sums: 0-d tensors to add up over ranks, the same keys on every rank.
            maxima: 0-d tensors of which the largest counts, the same keys on every rank.
        """
        forbidden = math.nan if self._changed is None else self._host_beta
        found = Found(not_finite, forbidden, self.deviation, sums or {}, maxima or {})
        self._counts, self._changed, self.deviation = None, None, 0.0
        agreed = together(found, self.accelerator)
        require_finite(agreed.not_finite, self.spec)
        for beta in agreed.forbidden_betas:
            self.controller.beta(beta)
        if self.states is not None:
            require_head(agreed.deviation, self.states.model)
        return agreed
