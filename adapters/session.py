"""What one process carries while it trains under a ``@loss`` spec: the same in every host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kl_plugins.adapters.controller import BetaChangedError, Controller
from kl_plugins.adapters.log_probs import NAMES, require_finite
from kl_plugins.hosts import Host
from kl_plugins.spec import KLSpec
from kl_plugins.spec.observation import Observation

Total = Callable[[Tensor], Tensor]
"""Sums a tensor over the data-parallel ranks, a collective in which every rank takes part."""


@dataclass
class Session:
    """Spec, controller, and what the micro-batches of the current optimizer step have shown.

    A rank that raised alone would leave the others waiting in their next collective. So micro-batches are counted,
    and :meth:`check` sums the counts over ranks and raises on all of them.

    Attributes:
        host: the host.
        spec: what the user named.
        controller: of beta.
        behaviour: where the receipt says that the behaviour policy's log-probs come from.
        confirmed: the trainer has asked for this process's receipt.
        reference: gives the reference's logits, where the spec needs them.
        applied: the coefficient of the current micro-batch.
        observation: what the user asked to observe; the spec is then measured and not applied.
        truncated: responses are sampled from a part of the distribution, and the sampler's log-probs are that part's.
        steps: optimizer steps under an observation; the present one is counted.
        counted: the tokens of this process belong into sums over ranks. Of several processes that share a sequence,
            and so hold the same tokens, one is counted.
        elsewhere: the device of this process where other processes compute the loss, as the last stage of a pipeline
            does for all stages; None where this process computes it.
    """

    host: Host
    spec: KLSpec
    controller: Controller
    behaviour: str = "unused"
    confirmed: bool = False
    reference: Any = None
    applied: float = 0.0
    observation: Observation | None = None
    truncated: bool = False
    steps: int = 0
    counted: bool = True
    elsewhere: torch.device | None = None
    _counts: Tensor | None = field(default=None, repr=False)
    _changed: BetaChangedError | None = None

    @property
    def text(self) -> str:
        """What receipts name: the canonical text of the observation or of the spec."""
        return str(self.spec if self.observation is None else self.observation)

    @property
    def probing(self) -> bool:
        """Whether the present optimizer step has a probe."""
        return self.observation is not None and self.observation.probes(self.steps)

    def require_confirmed(self, call: str) -> None:
        """Raise before an update if no trainer has asked for this process's receipt.

        Args:
            call: how a trainer that is not the host's own asks, as code.

        Raises:
            RuntimeError: no trainer has asked.
        """
        if not self.confirmed:
            raise RuntimeError(
                f"kl-plugins: this worker should train under {self.spec}, but its trainer never asked for receipts, so "
                "other workers may train without it. Either kl-plugins is missing where the trainer runs (install it "
                f"on every node), or the trainer is not one of {self.host.title}'s own: call "
                f"kl_plugins.adapters.{self.host.name}.{call} before its first update"
            )

    def start_step(self) -> None:
        """Drop what an optimizer step that was broken off has left."""
        self._counts, self._changed = None, None
        self.controller.forget()

    def coefficient(self, host: float) -> float:
        """Return the beta of the micro-batch that begins now.

        A change that the spec's own schedule forbids is reported by :meth:`check`, on all ranks together.

        Args:
            host: the host's coefficient now; programs may change it during a run.
        """
        self.applied = self.controller.due(host)
        try:
            self.controller.beta(host)
        except BetaChangedError as error:
            self._changed = error
        return self.applied

    def add(self, not_finite: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor) -> None:
        """Count one micro-batch; nothing is read back from the device.

        Args:
            not_finite: (5,) counts of :func:`kl_plugins.adapters.log_probs.count_not_finite`.
            logp, ref_logp: (B, T) log-probs of policy and reference, detached, nats.
            mask: (B, T), True on response tokens.
        """
        self.controller.observe(logp, ref_logp, mask)
        self._counts = not_finite if self._counts is None else self._counts + not_finite

    @property
    def unchecked(self) -> bool:
        """Whether there are micro-batches that :meth:`check` has not seen."""
        return self._counts is not None

    def check(self, total: Total, further: Tensor | None = None) -> list[float]:
        """Look at everything that an optimizer step is made of, just before the step, and advance beta.

        Args:
            total: sums a vector over all ranks, counted or not: the counts by name, the response tokens, whether the
                coefficient was changed, what the controller observed, and ``further``.
            further: 1-d, numbers of the host's own to sum along.

        Returns:
            The sums of ``further``, and the number of response tokens at the end.

        Raises:
            LogProbError: on all ranks; a log-prob that the spec needs is not finite on one of them.
            BetaChangedError: on all ranks; the host's coefficient was changed on one of them although the spec
                controls beta.
            RuntimeError: no micro-batch has been computed under the spec, in a process that computes the loss.
        """
        if self._counts is None and self.elsewhere is not None:
            self._counts = torch.zeros(len(NAMES) + 1, device=self.elsewhere)
            self.controller.observe_elsewhere(self.elsewhere)
        if self._counts is None:
            raise RuntimeError(
                f"kl-plugins: {self.host.title} is about to make an optimizer step without having computed the loss of "
                f"{self.spec}; this engine or trainer is not known"
            )
        dtype = torch.float32 if self._counts.device.type == "mps" else torch.float64  # MPS has no float64
        counts, observed = self._counts.to(dtype), self.controller.observed
        changed = counts.new_full((1,), float(self._changed is not None))
        if not self.counted:
            counts, observed = torch.zeros_like(counts), None if observed is None else torch.zeros_like(observed)
        parts = [counts, changed, *(part.to(counts) for part in (observed, further) if part is not None)]
        summed = total(torch.cat(parts))
        numbers = summed.tolist()
        unknown, ranks, rest = numbers[: len(NAMES) + 1], numbers[len(NAMES) + 1], summed[len(NAMES) + 2 :]
        if self._changed is not None:
            raise self._changed
        if ranks:
            raise BetaChangedError(
                f"kl-plugins: {self.controller.setting} was changed during the run on {int(ranks)} ranks, but the spec "
                f"{self.spec} controls beta itself; leave beta out of the spec, or {self.controller.setting} alone"
            )
        # Before the controller, which would raise as well when it is given a NaN, and say less about it.
        require_finite(unknown, self.spec)
        self._counts = None
        seen = 0 if observed is None else len(observed)
        self.controller.step(lambda _: rest[:seen])
        return [*rest[seen:].tolist(), unknown[-1]]
