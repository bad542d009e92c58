"""``@reward`` and ``@advantage``: the penalty where veRL shapes rewards, and its way to the advantages."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from kl_plugins.adapters.verl.beta import ScoreBeta
from kl_plugins.adapters.verl.loss import MASK, OLD, SAMPLER
from kl_plugins.controllers import observed_kl_sums
from kl_plugins.metrics import penalty_metrics
from kl_plugins.penalty import kl_penalty
from kl_plugins.spec import KLSpec

REFERENCE = "ref_log_prob"
"""veRL's key of the reference's log-probs."""

PENALTY = "kl_plugins_penalty"
"""Key of beta times the ``@advantage`` penalty (B, T), from where rewards are shaped to where advantages are final."""

current: ContextVar[Tensor | None] = ContextVar("kl_plugins_verl_penalty", default=None)
"""The penalty that the hook around veRL's KL function hands out while rewards are shaped."""


class NoSubtraction:
    """Stands in for a controller whose product with the KL would be subtracted from the rewards: its beta is 0."""

    value = 0.0

    def __init__(self, control: ScoreBeta) -> None:
        self._control = control

    def update(self, current_kl: float, n_steps: int) -> None:
        """Pass veRL's observation on."""
        self._control.update(current_kl=current_kl, n_steps=n_steps)


def penalty_of(spec: KLSpec, batch: Any) -> tuple[Tensor, dict[str, Tensor], tuple[float, float]]:
    """The (B, T) penalty of a rollout batch per unit beta, its metrics, and the observed KL.

    Args:
        spec: a score spec.
        batch: veRL's padded batch: the trainer's log-probs, the reference's, the mask, and the sampler's if there.

    Returns:
        Penalty, 0-d metrics by key, and (sum of k3 in nats, response tokens).

    Raises:
        ValueError: a log-prob of a response token is not finite.
    """
    logp, ref, mask = batch[OLD], batch[REFERENCE], batch[MASK].bool()
    for name, values in ((OLD, logp), (REFERENCE, ref)):
        unknown = int((~torch.isfinite(values) & mask).sum())
        if unknown:
            raise ValueError(
                f"kl-plugins: {name} is not finite on {unknown} of {int(mask.sum())} response tokens, so {spec} "
                "has no value "
                "there. Resume from the last checkpoint, with a smaller learning rate if the policy diverged."
            )
    penalty = kl_penalty(spec, logp, ref, mask)
    sampler = batch[SAMPLER] if SAMPLER in batch.keys() else None  # noqa: SIM118  TensorDict has no plain `in`
    kl, tokens = observed_kl_sums(logp, ref, mask)
    return penalty, penalty_metrics(penalty, logp, ref, sampler, mask), (kl.item(), tokens.item())


_sender: ContextVar[ScoreBeta | None] = ContextVar("kl_plugins_verl_sender", default=None)


def hand_on(batch: Any, penalty: Tensor, control: ScoreBeta) -> None:
    """Put an ``@advantage`` penalty, beta included, into the batch; it is pending until the advantages have it."""
    batch[PENALTY] = penalty
    control.pending = True
    _sender.set(control)


def take_penalty(batch: Any) -> Tensor | None:
    """Take the ``@advantage`` penalty out of the batch; None where there is none, or an outer hook has taken it."""
    if PENALTY not in batch.keys():  # noqa: SIM118  TensorDict has no plain `in`
        return None
    control = _sender.get()
    if control is not None:
        control.pending = False
    penalty: Tensor = batch.pop(PENALTY)
    return penalty


def site(spec: KLSpec, config: Any) -> str:
    """What veRL does with a KL in the reward, for the receipt."""
    estimator = str(getattr(config.algorithm.adv_estimator, "value", config.algorithm.adv_estimator))
    if spec.placement == "advantage":
        return f"none: subtracted per token from {estimator} advantages after normalisation"
    if estimator == "gae":
        return "token rewards - beta * k_t, then GAE with the critic, then whitening"
    if estimator == "grpo":
        scaled = config.algorithm.get("norm_adv_by_std_in_grpo", True)
        after = ", then division by the group's std (with tied rewards beta cancels)" if scaled else ""
        return f"token rewards - beta * k_t, summed per response, then the group mean is subtracted{after}"
    return f"token rewards - beta * k_t, then the {estimator} estimator"
