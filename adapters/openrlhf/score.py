"""``@reward`` and ``@advantage``: the penalty where OpenRLHF shapes rewards, and its way to the advantages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kl_plugins.adapters.beta import observed_sums, restored
from kl_plugins.adapters.openrlhf.metrics import Accumulator
from kl_plugins.adapters.openrlhf.sampler import usable
from kl_plugins.controllers import init, update
from kl_plugins.metrics import penalty_metrics
from kl_plugins.penalty import kl_penalty
from kl_plugins.spec import KLSpec


class ScoreBeta:
    """Stands in for OpenRLHF's controller of the KL in reward: the spec's schedule, else OpenRLHF's own.

    Attributes:
        spec: a score spec.
        host: OpenRLHF's own controller.
        metrics: of the rollout batches since the last report.
    """

    def __init__(self, spec: KLSpec, host: Any) -> None:
        """Take over from OpenRLHF's controller."""
        self.spec, self.host, self.metrics = spec, host, Accumulator()
        self.state = init(spec.beta, float(host.value))
        self._observed: Tensor | None = None
        self._penalties: list[tuple[Any, Tensor]] = []

    @property
    def value(self) -> float:
        """Beta to use now."""
        return float(self.host.value if self.spec.beta is None else self.state["beta"])

    @property
    def pending(self) -> bool:
        """Whether ``@advantage`` penalties are on their way."""
        return bool(self._penalties)

    def update(self, current: float, n_steps: int) -> None:
        """OpenRLHF calls this once per rollout batch; the spec's schedule uses the token-weighted k3 instead."""
        if self.spec.beta is None:
            self.host.update(current, n_steps)
        elif self._observed is not None:
            kl, tokens, sequences = self._observed.tolist()
            self.state = update(self.state, kl / max(tokens, 1.0), int(sequences))

    def saved(self) -> dict[str, Any]:
        """The controller's state for a checkpoint."""
        return dict(self.state)

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Go on from a checkpoint's state."""
        self.state = restored(self.state, saved, self.spec.beta)

    def penalise(self, samples: Any, logp: Tensor, ref_logp: Tensor) -> Tensor:
        """What OpenRLHF takes for the KL of one batch of samples; an ``@advantage`` penalty is kept for later.

        Args:
            samples: OpenRLHF's ``Experience`` before its log-probs are filled in.
            logp: (B, T) the trainer's log-probs, nats.
            ref_logp: (B, T) the reference's, nats.

        Returns:
            (B, T): the penalty, or for ``@advantage`` the same estimator's value of each token, which is for logs only.

        Raises:
            ValueError: a log-prob of a response token is not finite.
        """
        mask = samples.action_mask.bool()
        self._refuse_unknown(mask, policy=logp, reference=ref_logp)
        penalty = kl_penalty(self.spec, logp, ref_logp, mask)
        found = penalty_metrics(penalty, logp, ref_logp, usable(samples.rollout_log_probs, logp), mask)
        self.metrics.add(found, mask, self.value)
        sums = observed_sums(logp, ref_logp, mask)
        self._observed = sums if self._observed is None else self._observed + sums
        if self.spec.placement == "reward":
            return penalty
        self._penalties.append((samples, penalty))
        return kl_penalty(replace(self.spec, horizon="token", future=None, gamma=1.0), logp, ref_logp, mask)

    def _refuse_unknown(self, mask: Tensor, **log_probs: Tensor) -> None:
        for name, values in log_probs.items():
            unknown = int((~torch.isfinite(values) & mask).sum())
            if unknown:
                raise ValueError(
                    f"kl-plugins: the {name}'s log-probs are not finite on {unknown} of {int(mask.sum())} response "
                    f"tokens, so {self.spec} has no value there. Resume from the last checkpoint, with a smaller "
                    "learning rate if the policy diverged."
                )

    def start_batch(self) -> None:
        """Forget the last rollout batch."""
        self._observed, self._penalties = None, []

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
