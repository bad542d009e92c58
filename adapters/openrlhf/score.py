"""``@reward`` and ``@advantage``: the penalty where OpenRLHF shapes rewards, and its way to the advantages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kl_plugins.adapters.controller import Controller
from kl_plugins.adapters.log_probs import POLICY, REFERENCE, count_not_finite, finite_or, require_finite
from kl_plugins.adapters.metrics import Accumulator
from kl_plugins.adapters.openrlhf.host import COEFFICIENT_FLAG
from kl_plugins.adapters.openrlhf.sampler import unmarked
from kl_plugins.metrics import penalty_metrics
from kl_plugins.penalty import kl_penalty
from kl_plugins.spec import KLSpec


class ScoreBeta:
    """Stands in for OpenRLHF's controller of the KL in reward: the spec's schedule, else OpenRLHF's own.

    Attributes:
        spec: a score spec.
        host: OpenRLHF's own controller.
        control: the shared one; what OpenRLHF's controller says goes through it.
        metrics: of the rollout batches since the last report.
    """

    def __init__(self, spec: KLSpec, host: Any) -> None:
        """Take over from OpenRLHF's controller."""
        self.spec, self.host, self.metrics = spec, host, Accumulator()
        self.control = Controller(spec.beta, float(host.value), COEFFICIENT_FLAG)
        self._not_finite: Tensor | None = None
        self._penalties: list[tuple[Any, Tensor]] = []

    @property
    def value(self) -> float:
        """Beta to use now.

        Raises:
            BetaChangedError: OpenRLHF's coefficient has changed although the spec controls beta.
        """
        return self.control.beta(self.host.value)

    @value.setter
    def value(self, value: float) -> None:
        # Whoever sets the coefficient during a run does not know that another object stands here.
        self.host.value = value

    @property
    def pending(self) -> bool:
        """Whether ``@advantage`` penalties are on their way."""
        return bool(self._penalties)

    def update(self, current: float, n_steps: int) -> None:
        """OpenRLHF calls this once per rollout batch; the spec's schedule uses the token-weighted k3 instead."""
        if self.spec.beta is None:
            self.host.update(current, n_steps)
        else:
            self.control.step()

    def penalise(self, samples: Any, logp: Tensor, ref_logp: Tensor) -> Tensor:
        """What OpenRLHF takes for the KL of one batch of samples; an ``@advantage`` penalty is kept for later.

        Args:
            samples: OpenRLHF's ``Experience`` before its log-probs are filled in.
            logp: (B, T) the trainer's log-probs, nats.
            ref_logp: (B, T) the reference's, nats.

        Returns:
            (B, T): the penalty, or for ``@advantage`` the same estimator's value of each token, which is for logs only.
        """
        mask = samples.action_mask.bool()
        counts = count_not_finite({POLICY: logp, REFERENCE: ref_logp}, mask)
        self._not_finite = counts if self._not_finite is None else self._not_finite + counts
        penalty = kl_penalty(self.spec, logp, ref_logp, mask)
        sampler = finite_or(unmarked(samples.rollout_log_probs, logp, required=False), logp)
        self.metrics.add(penalty_metrics(penalty, logp, ref_logp, sampler, mask), mask, self.value)
        self.control.observe(logp, ref_logp, mask)
        if self.spec.placement == "reward":
            return penalty
        self._penalties.append((samples, penalty))
        return kl_penalty(replace(self.spec, horizon="token", future=None, gamma=1.0), logp, ref_logp, mask)

    def start_batch(self) -> None:
        """Forget the last rollout batch."""
        self.control.forget()
        self._not_finite, self._penalties = None, []

    def require_finite(self) -> None:
        """Raise where a penalty of the rollout batch has no value, before the advantages are computed.

        Raises:
            LogProbError: whose log-probs, and on how many of the rollout batch's response tokens.
        """
        if self._not_finite is not None:
            require_finite(self._not_finite, self.spec)

    def suppress_in_reward(self) -> None:
        """Take an ``@advantage`` estimator's values out of what OpenRLHF subtracts from the rewards."""
        for samples, _ in self._penalties:
            samples.kl = torch.zeros_like(samples.kl)

    def subtract(self, experiences: Sequence[Any]) -> None:
        """Subtract the ``@advantage`` penalties from final advantages, in place.

        Args:
            experiences: OpenRLHF's, with advantages; the very objects that were penalised.

        Raises:
            RuntimeError: they are others.
        """
        penalties, self._penalties = self._penalties, []
        if [id(samples) for samples, _ in penalties] != [id(experience) for experience in experiences]:
            raise RuntimeError(
                f"kl-plugins: the penalties of {self.spec} belong to other experiences than the advantages; this "
                "experience maker is not known"
            )
        for experience, penalty in penalties:
            experience.advantages = experience.advantages - self.value * penalty.to(experience.advantages)


_shaping: ContextVar[tuple[ScoreBeta, Iterator[Any]] | None] = ContextVar("kl_plugins_openrlhf_shaping", default=None)


@contextmanager
def shaping(control: ScoreBeta, samples: Sequence[Any]) -> Iterator[None]:
    """Within the block, OpenRLHF asks for the KL of each batch of samples, in order.

    Raises:
        RuntimeError: it did not ask for all of them.
        LogProbError: log-probs are not finite.
    """
    control.start_batch()
    rest = iter(samples)
    token = _shaping.set((control, rest))
    try:
        yield
    finally:
        _shaping.reset(token)
    if next(rest, None) is not None:
        raise RuntimeError(
            f"kl-plugins: OpenRLHF did not ask for the KL of every sample, so {control.spec} would not be applied to "
            "all; is there a reference model?"
        )
    control.require_finite()


def next_samples() -> tuple[ScoreBeta, Any] | None:
    """The controller, and the samples whose KL OpenRLHF asks for now; None outside of :func:`shaping`."""
    shaping = _shaping.get()
    samples = None if shaping is None else next(shaping[1], None)
    return None if shaping is None or samples is None else (shaping[0], samples)


def site(spec: KLSpec, args: Any) -> str:
    """What OpenRLHF does with a KL in the reward, for the receipt."""
    advantage = args.algo.advantage
    whitening = "centring" if advantage.no_std_norm else "whitening"
    if spec.placement == "advantage":
        return f"none: subtracted per token from final {advantage.estimator} advantages"
    if advantage.estimator == "gae":
        return f"token rewards - beta * k_t, then GAE with the critic, then {whitening} over the batch"
    if advantage.estimator == "reinforce":
        return f"token rewards - beta * k_t, then discounted returns to go, then {whitening} over the batch"
    after = f", then {whitening} over the batch" if advantage.estimator == "reinforce_baseline" else ""
    return (
        f"the {advantage.estimator} baseline comes from task rewards alone; then token rewards - beta * k_t, summed to "
        f"returns to go{after}"
    )
