"""``@reward`` and ``@advantage`` where a host computes the KL of a rollout: the penalty, and the host's controller.

veRL and OpenRLHF hold an object with the attribute ``value`` that gives beta and is updated once per rollout batch.
:class:`ScoreController` takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from kl_plugins.adapters.controller import Controller
from kl_plugins.adapters.log_probs import POLICY, REFERENCE, count_not_finite, finite_or
from kl_plugins.metrics import penalty_metrics
from kl_plugins.penalty import kl_penalty
from kl_plugins.spec import KLSpec


class ScoreController:
    """Stands in for a host's controller of the KL in the reward: the spec's schedule, or else the host's own.

    Attributes:
        spec: a ``@reward`` or ``@advantage`` spec.
        host: the host's own controller object.
        controller: of the spec's ``beta:`` option; it observes every rollout batch.
    """

    def __init__(self, spec: KLSpec, host: Any, setting: str) -> None:
        """Take over from the host's controller.

        Args:
            spec: a ``@reward`` or ``@advantage`` spec.
            host: the host's own controller object.
            setting: the host's setting that holds its coefficient, for messages.
        """
        self.spec, self.host = spec, host
        self.controller = Controller(spec.beta, float(host.value), setting)

    @property
    def value(self) -> float:
        """Beta to use now.

        Raises:
            BetaChangedError: the host's coefficient was changed although the spec controls beta.
        """
        return self.controller.beta(float(self.host.value))

    @value.setter
    def value(self, value: float) -> None:
        # A program that sets the coefficient during a run does not know that another object is here.
        self.host.value = value

    def update(self, current_kl: float, n_steps: int) -> None:
        """Advance; the host calls this once per rollout batch. The spec's schedule uses the KL that it observed itself.

        Args:
            current_kl: what the host takes for the KL of the batch.
            n_steps: what the host takes for the number of responses.
        """
        if self.spec.beta is None:
            self.host.update(current_kl, n_steps)
        else:
            self.controller.step()

    def saved(self) -> dict[str, Any]:
        """Return the state for a checkpoint, with the host's coefficient, which its controller may have moved."""
        return {**self.controller.saved(), "host_value": float(self.host.value)}

    def restore(self, saved: Mapping[str, Any] | None, host_value: bool = False) -> None:
        """Go on from a checkpoint's state.

        Args:
            saved: what :meth:`saved` gave.
            host_value: the host's own controller changes its value during a run, so that it belongs to the state.
        """
        self.controller.restore(saved)
        if host_value and saved is not None and "host_value" in saved:
            self.host.value = saved["host_value"]


class Penalty(NamedTuple):
    """What becomes of the KL of a rollout batch.

    Attributes:
        penalty: (B, T) per unit beta, nats.
        kl: (B, T) nats, the KL of each token alone. Hosts log its mean, and their adaptive controllers follow that. An
            ``@advantage`` penalty holds the KL of later tokens as well, so its mean is no KL per token.
        metrics: 0-d tensors by key.
        not_finite: (5,) counts of :func:`kl_plugins.adapters.log_probs.count_not_finite`.
    """

    penalty: Tensor
    kl: Tensor
    metrics: dict[str, Tensor]
    not_finite: Tensor


def penalty_of(
    control: ScoreController, logp: Tensor, ref_logp: Tensor, mask: Tensor, sampler_logp: Tensor | None
) -> Penalty:
    """Compute the penalty of a rollout batch; the controller observes its KL.

    Args:
        control: of a score spec.
        logp: (B, T) the trainer's log-probs, nats.
        ref_logp: (B, T) the reference's, nats.
        mask: (B, T) bool, True on response tokens.
        sampler_logp: (B, T) the sampler's, nats, or None; for metrics only.
    """
    spec = control.spec
    control.controller.observe(logp, ref_logp, mask)
    penalty = kl_penalty(spec, logp, ref_logp, mask)
    own = replace(spec, horizon="token", future=None, gamma=1.0)
    kl = penalty if spec.placement == "reward" else kl_penalty(own, logp, ref_logp, mask)
    metrics = penalty_metrics(penalty, logp, ref_logp, finite_or(sampler_logp, logp), mask)
    return Penalty(penalty, kl, metrics, count_not_finite({POLICY: logp, REFERENCE: ref_logp}, mask))
