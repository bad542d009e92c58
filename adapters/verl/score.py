"""``@reward`` and ``@advantage``: the penalty where veRL shapes rewards, and its way to the advantages."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from kl_plugins.adapters.log_probs import POLICY, count_not_finite, finite_or, require_finite
from kl_plugins.adapters.log_probs import REFERENCE as OF_REFERENCE
from kl_plugins.adapters.verl.beta import ScoreBeta
from kl_plugins.adapters.verl.loss import MASK, OLD, SAMPLER
from kl_plugins.metrics import penalty_metrics
from kl_plugins.penalty import kl_penalty
from kl_plugins.spec import KLSpec

REFERENCE = "ref_log_prob"
"""veRL's key of the reference's log-probs."""

PENALTY = "kl_plugins_penalty"
"""Key of beta times the ``@advantage`` penalty (B, T) in veRL's batch, and of its controller in the batch's notes.

Both are there from where rewards are shaped to where advantages are final.
"""

current: ContextVar[Tensor | None] = ContextVar("kl_plugins_verl_kl", default=None)
"""What the hook around veRL's KL function hands out while rewards are shaped."""


class NoSubtraction:
    """Stands in for a controller whose product with the KL would be subtracted from the rewards: its beta is 0."""

    value = 0.0

    def __init__(self, control: ScoreBeta) -> None:
        self._control = control

    def update(self, current_kl: float, n_steps: int) -> None:
        """Pass veRL's observation on."""
        self._control.update(current_kl=current_kl, n_steps=n_steps)


class Shaped(NamedTuple):
    """What becomes of the KL of a rollout batch.

    Attributes:
        penalty: (B, T) per unit beta, nats.
        kl: (B, T) nats, what veRL takes for the KL: it logs its mean, and its adaptive controller follows that.
        metrics: 0-d tensors by key.
    """

    penalty: Tensor
    kl: Tensor
    metrics: dict[str, Tensor]


def shape(control: ScoreBeta, batch: Any) -> Shaped:
    """The penalty of a rollout batch; the controller observes its KL.

    Args:
        control: of a score spec.
        batch: veRL's padded batch: the trainer's log-probs, the reference's, the mask, and the sampler's if there.

    Raises:
        LogProbError: a log-prob of a response token is not finite.
    """
    spec, logp, ref, mask = control.spec, batch[OLD], batch[REFERENCE], batch[MASK].bool()
    require_finite(count_not_finite({POLICY: logp, OF_REFERENCE: ref}, mask), spec)
    control.controller.forget()
    control.controller.observe(logp, ref, mask)
    penalty = kl_penalty(spec, logp, ref, mask)
    # An @advantage penalty holds the KL of later tokens as well: its mean is no KL per token.
    own = replace(spec, horizon="token", future=None, gamma=1.0)
    kl = penalty if spec.placement == "reward" else kl_penalty(own, logp, ref, mask)
    sampler = batch[SAMPLER] if SAMPLER in batch.keys() else None  # noqa: SIM118  TensorDict has no plain `in`
    return Shaped(penalty, kl, penalty_metrics(penalty, logp, ref, finite_or(sampler, logp), mask))


def hand_on(data: Any, penalty: Tensor, control: ScoreBeta) -> None:
    """Put an ``@advantage`` penalty, beta included, into veRL's batch; it is pending until the advantages have it."""
    data.batch[PENALTY], data.meta_info[PENALTY] = penalty, control
    control.pending = True


def take_penalty(data: Any) -> Tensor | None:
    """Take the ``@advantage`` penalty out of the batch; None where there is none, or an outer hook has taken it."""
    control: ScoreBeta | None = data.meta_info.pop(PENALTY, None)
    if control is None:
        return None
    penalty: Tensor = data.batch.pop(PENALTY)
    control.pending = False
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
