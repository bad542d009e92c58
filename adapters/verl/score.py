"""``@reward`` and ``@advantage``: the penalty where veRL shapes rewards, and its way to the advantages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kl_plugins.adapters import score
from kl_plugins.adapters.log_probs import require_finite
from kl_plugins.adapters.micro_batch import KLSource
from kl_plugins.adapters.score import Penalty, penalty_of
from kl_plugins.adapters.verl import SCORE_BETA
from kl_plugins.adapters.verl.batch import MASK, OLD, REFERENCE, SAMPLER
from kl_plugins.adapters.verl.config import estimator_of
from kl_plugins.spec import KLSpec

PENALTY = "kl_plugins_penalty"
"""Key of beta times the ``@advantage`` penalty (B, T) in veRL's batch, and of its controller in the batch's notes.

Both are there from where rewards are shaped to where advantages are final.
"""


class ScoreController(score.ScoreController):
    """Stands in for veRL's controller of the KL in the reward.

    Attributes:
        pending: an ``@advantage`` penalty was computed, and no advantages have taken it yet.
    """

    def __init__(self, spec: KLSpec, host: Any) -> None:
        """Take over from veRL's controller.

        Args:
            spec: a score spec.
            host: veRL's own controller object.
        """
        super().__init__(spec, host, SCORE_BETA)
        self.pending = False


class NoSubtraction:
    """Stands in for a controller whose product with the KL veRL would subtract from the rewards: its beta is 0."""

    value = 0.0

    def __init__(self, control: ScoreController) -> None:
        self._control = control

    def update(self, current_kl: float, n_steps: int) -> None:
        """Pass veRL's observation on."""
        self._control.update(current_kl=current_kl, n_steps=n_steps)


@dataclass
class Shaping(KLSource):
    """The reward shaping of one rollout batch: what veRL's KL function should return in it.

    Attributes:
        control: of a score spec.
        found: the batch's penalty.
        beta: the coefficient of this batch.
    """

    control: ScoreController
    found: Penalty
    beta: float

    @classmethod
    def of(cls, control: ScoreController, batch: Any) -> Shaping:
        """Compute the penalty of a rollout batch; the controller observes its KL.

        Args:
            control: of a score spec.
            batch: veRL's padded batch: the trainer's log-probs, the reference's, the mask, and the sampler's if there.

        Raises:
            LogProbError: a log-prob of a response token is not finite.
        """
        control.controller.forget()
        sampler = batch[SAMPLER] if SAMPLER in batch.keys() else None  # noqa: SIM118  TensorDict has no plain `in`
        found = penalty_of(control, batch[OLD], batch[REFERENCE], batch[MASK].bool(), sampler)
        require_finite(found.not_finite, control.spec)
        return cls(control, found, control.value)

    def term(self, logp: Tensor, ref_logp: Tensor) -> Tensor:
        """Return the (B, T) KL of each token, in nats; it was computed from the same log-probs."""
        return self.found.kl

    def subtracted(self) -> Any:
        """Return the controller that veRL should multiply the KL with: only ``@reward`` subtracts it from rewards."""
        return self.control if self.control.spec.placement == "reward" else NoSubtraction(self.control)

    def finish(self, data: Any, metrics: dict[str, Any]) -> dict[str, Any]:
        """Put an ``@advantage`` penalty into veRL's batch, where it waits for the advantages; return all metrics.

        Args:
            data: veRL's ``DataProto``.
            metrics: veRL's own.
        """
        if self.control.spec.placement == "advantage":
            data.batch[PENALTY], data.meta_info[PENALTY] = self.beta * self.found.penalty, self.control
            self.control.pending = True
            metrics = {**metrics, "actor/reward_kl_penalty_coeff": self.beta}
        return {**metrics, **{key: value.item() for key, value in self.found.metrics.items()}, "kl/beta": self.beta}


def take_penalty(data: Any) -> Tensor | None:
    """Take the ``@advantage`` penalty out of the batch; None if there is none, or an outer hook has taken it."""
    control: ScoreController | None = data.meta_info.pop(PENALTY, None)
    if control is None:
        return None
    penalty: Tensor = data.batch.pop(PENALTY)
    control.pending = False
    return penalty


def subtract(data: Any, penalty: Tensor | None) -> None:
    """Subtract a penalty, beta included, from final advantages, in place.

    Args:
        data: veRL's ``DataProto``.
        penalty: (B, T) what :func:`take_penalty` gave before the advantages were computed.
    """
    if penalty is not None:
        advantages = data.batch["advantages"]
        data.batch["advantages"] = advantages - penalty.to(advantages)


def site(spec: KLSpec, config: Any) -> str:
    """Say what veRL does with a KL in the reward, for the receipt."""
    estimator = estimator_of(config.algorithm)
    if spec.placement == "advantage":
        return f"none: subtracted per token from {estimator} advantages after normalisation"
    if estimator == "gae":
        return "token rewards - beta * k_t, then GAE with the critic, then whitening"
    if estimator == "grpo":
        scaled = config.algorithm.get("norm_adv_by_std_in_grpo", True)
        after = ", then division by the group's std (with tied rewards beta cancels)" if scaled else ""
        return f"token rewards - beta * k_t, summed per response, then the group mean is subtracted{after}"
    return f"token rewards - beta * k_t, then the {estimator} estimator"
