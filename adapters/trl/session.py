"""What one trainer carries while it trains under a spec, and the events of the trainer that drive it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import TrainerCallback

from kl_plugins.adapters import session as shared
from kl_plugins.adapters.checkpoints import record, resumed
from kl_plugins.adapters.log_probs import require_finite
from kl_plugins.adapters.metrics import sums_and_maxima, warn_if_floored
from kl_plugins.adapters.receipts import announce
from kl_plugins.adapters.trl.exact import AGREED, Deviation, StateKL, require_agreement
from kl_plugins.adapters.trl.ranks import Found, Together, Window, exchange, together
from kl_plugins.receipts import Receipt
from kl_plugins.spec import KLSpec

if TYPE_CHECKING:
    from kl_plugins.adapters.trl.batch import Scored

STATE_KEY = "kl_plugins"
"""Where spec and controller lie in ``trainer_state.json``, among the states of callbacks."""


@dataclass(kw_only=True)
class Session(shared.Session):
    """Spec, controller and records of one trainer.

    Other hosts sum over the ranks once before an optimizer step. TRL's log needs maxima as well, so here one gather per
    micro-batch carries the checks and the metrics: see :meth:`agree`.

    Attributes:
        accelerator: the trainer's.
        receipt: makes this process's receipt.
        score_policy: scores the tokens of a recorded call under the policy: one forward pass without gradient.
        states: source of the KLs of states, where the spec needs them.
        training: False in evaluation, which moves no controller.
        passed: our code that TRL has gone through since the last optimizer step (``loss``) or ever (``rollout``).
        deviation: how far log-probs computed for exact terms are from TRL's own.
        windows: metrics since TRL last logged, in training and in evaluation.
        native: under an observation, the spec whose gradient TRL's own KL has; None if there is none.
        scores_reference: under an observation, TRL is made to score the reference although beta is 0.
    """

    accelerator: Any
    receipt: Callable[[], Receipt]
    score_policy: Callable[[Scored], Tensor]
    states: StateKL | None = None
    training: bool = True
    passed: set[str] = field(default_factory=set)
    deviation: Deviation = AGREED
    windows: dict[bool, Window] = field(default_factory=lambda: {True: Window(), False: Window()})
    native: KLSpec | None = None
    scores_reference: bool = False
    _host_beta: float = math.nan
    _shown: tuple[Tensor, ...] = ()

    @property
    def probing(self) -> bool:
        """Whether the present optimizer step has a probe; evaluation has none."""
        return self.training and super().probing

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
        self._counts, self._changed, self.deviation = None, None, AGREED
        agreed = together(found, self.accelerator)
        require_finite(agreed.not_finite, self.spec)
        for beta in agreed.forbidden_betas:
            self.controller.beta(beta)
        if self.states is not None:
            require_agreement(agreed.deviation, self.states.model)
        return agreed


class KLCallback(TrainerCallback):  # type: ignore[misc]
    """Drives one :class:`Session` from the trainer's public events.

    They are used for the receipts at the start, a check before each update, beta after it, and the checkpoints.
    """

    def __init__(self, session: Session) -> None:
        """Take over a session."""
        self.session = session

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log and exchange receipts, and go on from the checkpoint's beta.

        Raises:
            SpecChangedError: the checkpoint was written under another spec.
        """
        receipt = self.session.receipt()
        announce(receipt)
        exchange(receipt)
        if state.global_step > 0:
            saved = resumed(state.stateful_callbacks.get(STATE_KEY), self.session.spec)
            self.session.controller.restore(saved)
        else:
            self.session.controller.restart()
        self._save(state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop before an update that would go without the regulariser.

        Raises:
            RuntimeError: TRL went around a hook.
        """
        needed = {"loss", "rollout"} if self.session.is_score else {"loss"}
        missing = needed - self.session.passed
        if missing:
            raise RuntimeError(
                f"kl-plugins: {self.session.spec} was not applied before update {state.global_step + 1}: the trainer "
                f"never went through TRL's own {' and '.join(sorted(missing))} code. Attach before training and detach "
                "after it; a subclass has to call super() in the methods it overrides"
            )
        self.session.passed.discard("loss")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the controller, once per optimizer step."""
        accelerator = self.session.accelerator
        self.session.controller.step(lambda sums: accelerator.reduce(sums, reduction="sum"))
        self._save(state)

    def _save(self, state: Any) -> None:
        # The trainer writes this dict into every checkpoint. Restoring through transformers' own callback mechanism
        # would need a flag that is off by default, so on_train_begin reads it back itself.
        controller = self.session.controller
        saved = None if controller.schedule is None else controller.saved()
        state.stateful_callbacks[STATE_KEY] = record(self.session.spec, saved)
