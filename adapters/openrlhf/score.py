"""``@reward`` and ``@advantage``: the penalty where OpenRLHF shapes rewards, and its way to the advantages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kl_plugins.adapters import score
from kl_plugins.adapters.log_probs import require_finite
from kl_plugins.adapters.metrics import Accumulator
from kl_plugins.adapters.micro_batch import KLSource, entered
from kl_plugins.adapters.openrlhf import COEFFICIENT_FLAG
from kl_plugins.adapters.openrlhf.batch import unmarked
from kl_plugins.adapters.score import penalty_of
from kl_plugins.spec import KLSpec


class ScoreController(score.ScoreController):
    """Stands in for OpenRLHF's controller of the KL in the reward, and holds what becomes of a rollout batch.

    Attributes:
        metrics: of the rollout batches since the last report.
        penalties: batches of samples and their ``@advantage`` penalties (B, T) per unit beta, on their way from where
            rewards are shaped to where advantages are final.
    """

    def __init__(self, spec: KLSpec, host: Any) -> None:
        """Take over from OpenRLHF's controller.

        Args:
            spec: a ``@reward`` or ``@advantage`` spec.
            host: OpenRLHF's own controller.
        """
        super().__init__(spec, host, COEFFICIENT_FLAG)
        self.metrics = Accumulator()
        self.penalties: list[tuple[Any, Tensor]] = []

    def suppress_in_reward(self) -> None:
        """Take an ``@advantage`` estimator's values out of what OpenRLHF subtracts from the rewards."""
        for samples, _ in self.penalties:
            samples.kl = torch.zeros_like(samples.kl)

    def subtract(self, experiences: Sequence[Any]) -> None:
        """Subtract the ``@advantage`` penalties from final advantages, in place.

        Args:
            experiences: OpenRLHF's, with advantages; the very objects that were penalised.

        Raises:
            RuntimeError: they are other objects.
        """
        penalties, self.penalties = self.penalties, []
        if [id(samples) for samples, _ in penalties] != [id(experience) for experience in experiences]:
            raise RuntimeError(
                f"kl-plugins: the penalties of {self.spec} belong to other experiences than the advantages; this "
                "experience maker is not known"
            )
        for experience, penalty in penalties:
            experience.advantages = experience.advantages - self.value * penalty.to(experience.advantages)


class Shaping(KLSource):
    """A rollout batch whose rewards OpenRLHF shapes: it asks for the KL of each batch of samples, in order."""

    def __init__(self, control: ScoreController, samples: Sequence[Any]) -> None:
        """Begin with the first batch of samples.

        Args:
            control: takes the metrics and the ``@advantage`` penalties.
            samples: OpenRLHF's ``Experience`` of each batch, before its log-probs are filled in.
        """
        self.control, self.rest = control, list(samples)
        self._not_finite: Tensor | None = None

    def term(self, logp: Tensor, ref_logp: Tensor) -> Tensor:
        """Compute what OpenRLHF takes for the KL of the next batch of samples.

        Args:
            logp: (B, T) the trainer's log-probs, nats.
            ref_logp: (B, T) the reference's, nats.

        Returns:
            (B, T): the penalty, or for ``@advantage`` the same estimator's value of each token, which is for logs only.

        Raises:
            RuntimeError: OpenRLHF has asked for the KL of every batch already.
        """
        control = self.control
        if not self.rest:
            raise RuntimeError(
                f"kl-plugins: OpenRLHF asked for the KL of {control.spec} more often than it has batches of samples; "
                "that is not known"
            )
        samples = self.rest.pop(0)
        mask = samples.action_mask.bool()
        found = penalty_of(control, logp, ref_logp, mask, unmarked(samples.rollout_log_probs, logp, required=False))
        control.metrics.add(found.metrics, mask, control.value)
        self._not_finite = found.not_finite if self._not_finite is None else self._not_finite + found.not_finite
        if control.spec.placement == "advantage":
            control.penalties.append((samples, found.penalty))
        return found.kl

    def finish(self) -> None:
        """Raise where the rollout batch has no valid penalty, before the advantages are computed.

        Raises:
            RuntimeError: OpenRLHF did not ask for the KL of every batch of samples.
            LogProbError: whose log-probs are not finite, and on how many of the rollout batch's response tokens.
        """
        if self.rest:
            raise RuntimeError(
                f"kl-plugins: OpenRLHF did not ask for the KL of every sample, so {self.control.spec} would not be "
                "applied to all; is there a reference model?"
            )
        if self._not_finite is not None:
            require_finite(self._not_finite, self.control.spec)


@contextmanager
def shaping(control: ScoreController, samples: Sequence[Any]) -> Iterator[None]:
    """Within the block, OpenRLHF asks for the KL of each batch of samples, in order.

    Args:
        control: of the experience maker.
        samples: OpenRLHF's batches of samples.

    Raises:
        RuntimeError: it did not ask for all of them.
        LogProbError: log-probs are not finite.
    """
    control.controller.forget()  # a rollout batch that is made again must not count twice
    control.penalties = []
    batch = Shaping(control, samples)
    with entered(batch):
        yield
    batch.finish()
