"""What one trainer carries while it trains under a spec."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kl_plugins.adapters.controller import Controller
from kl_plugins.adapters.log_probs import count_not_finite, finite_or, require_finite, used
from kl_plugins.adapters.metrics import sums_and_maxima, warn_if_floored
from kl_plugins.adapters.trl.exact import StateKL, require_head
from kl_plugins.adapters.trl.log_probs import OLD, REFERENCE, SAMPLER, Recorder, Scored, policy_and_reference
from kl_plugins.adapters.trl.loss import loss_term, response_mask
from kl_plugins.adapters.trl.metrics import Window
from kl_plugins.adapters.trl.ranks import Found, Together, together
from kl_plugins.metrics import penalty_metrics
from kl_plugins.penalty import kl_penalty
from kl_plugins.receipts import Receipt
from kl_plugins.spec import KLSpec

PENALTY = "kl_plugins_penalty"
"""Key of the penalty (B, T), per unit beta, in the micro-batches that TRL buffers."""

ADVANTAGE_PENALTY = "kl_plugins_advantage_penalty"
"""The same, beta of the rollout included, where one importance ratio per sequence multiplies the advantages."""

BETA = "kl_plugins_beta"
"""Key of the beta that was applied to the rollout; a 0-d tensor, which TRL neither splits nor shuffles."""


@dataclass
class Session:
    """Spec, controller and records of one trainer.

    Attributes:
        spec: what the user named.
        behaviour: where the behaviour policy's log-probs come from.
        accelerator: the trainer's.
        controller: of beta.
        receipt: makes this process's receipt.
        state_kl: source of full-vocabulary KLs, where the spec needs them.
        recorder: the host's log-prob calls.
        applied: seams the host has gone through since the last optimizer step (``loss``) or ever (``rollout``).
        windows: metrics since the host last logged, in training and in evaluation.
    """

    spec: KLSpec
    behaviour: str
    accelerator: Any
    controller: Controller
    receipt: Callable[[], Receipt]
    state_kl: StateKL | None = None
    recorder: Recorder = field(default_factory=Recorder)
    applied: set[str] = field(default_factory=set)
    windows: dict[bool, Window] = field(default_factory=lambda: {True: Window(), False: Window()})
    _deviation: float = 0.0

    @property
    def is_score(self) -> bool:
        """Whether the KL sits in the rewards or advantages, not in the loss."""
        return self.spec.placement != "loss"

    def beta(self, host: float) -> float:
        """The coefficient to use now.

        A change that the spec's own schedule forbids is reported later, by all ranks together: see :meth:`_agreed`.

        Args:
            host: the trainer's ``beta`` now.
        """
        return self.controller.due(host)

    def rollout_penalty(
        self, score_policy: Callable[[Scored], Tensor], host_beta: float, mask: Tensor | None = None
    ) -> Tensor:
        """(B, T) penalty of the rollout per unit beta, from the log-probs that the host has just computed.

        Args:
            score_policy: scores the same tokens under the policy, where the host did not.
            host_beta: the trainer's ``beta`` now.
            mask: (B, T) response tokens; by default the response part of the attention mask that the host scored with.

        Raises:
            LogProbError: a log-prob of policy or reference is not finite, on any rank.
            BetaChangedError: the host's coefficient was changed against the spec's schedule, on any rank.
        """
        calls, exact = self.recorder.calls, None
        if self.state_kl is not None:
            exact, self._deviation, scored = self.state_kl.of_rollout(calls[-1], score_policy)
            policy, reference, attended = policy_and_reference(calls, lambda _: scored)
        else:
            policy, reference, attended = policy_and_reference(calls, score_policy)
        mask = attended if mask is None else mask
        used_here = used(self.spec, self.behaviour, policy=policy, reference=reference, old=None, sampler=None)
        self._agreed(host_beta, count_not_finite(used_here, mask))
        self.applied.add("rollout")
        return kl_penalty(self.spec, policy, reference, mask, exact=exact)

    def exact_of(self, states: list[Any], call: Scored) -> Tensor | None:
        """(B, T) full-vocabulary KL of what the host has just scored, where the spec needs it."""
        if self.state_kl is None:
            return None
        exact, self._deviation = self.state_kl.joined(states, call.logp, call.response_mask())
        return exact

    def beta_times_loss(
        self, inputs: Mapping[str, Any], logp: Tensor, host_kl: Tensor, beta: float, exact: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Beta times the spec's (B, T) term, in the place of the host's, and the term's metrics.

        Args:
            inputs: the host's micro-batch.
            logp: (B, T) the policy's log-probs, nats, with their graph.
            host_kl: the host's own KL, for its shape.
            beta: the coefficient.
            exact: (B, T) full-vocabulary KL of the states, where the spec needs it.

        Raises:
            RuntimeError: the host's KL has another shape, so the host would aggregate ours in another way.
        """
        term = loss_term(self.spec, self.behaviour, inputs, logp, exact)
        if host_kl.shape != term.loss.shape:
            raise RuntimeError(
                f"kl-plugins: TRL's per-token KL has shape {tuple(host_kl.shape)}, the spec's term "
                f"{tuple(term.loss.shape)}; this loss aggregates the KL in a way that kl-plugins does not know"
            )
        return beta * term.loss, term.metrics

    def finish_loss(
        self,
        inputs: Mapping[str, Any],
        logp: Tensor,
        found: dict[str, Tensor] | None,
        log: MutableMapping[str, list[float]],
        training: bool,
        host_beta: float,
    ) -> None:
        """Check the log-probs, observe the KL and log the metrics; every rank, every micro-batch, before backward.

        Args:
            inputs: the host's micro-batch.
            logp: (B, T) the policy's log-probs, nats.
            found: the loss term's metrics; None for score placements, which get the penalty's.
            log: the host's metrics of this mode.
            training: False in evaluation, which moves no controller.
            host_beta: the trainer's ``beta`` now.

        Raises:
            LogProbError: a log-prob that the spec needs is not finite, on any rank.
            BetaChangedError: the host's coefficient was changed against the spec's schedule, on any rank.
        """
        mask, reference, old = response_mask(inputs), inputs[REFERENCE], inputs.get(OLD)
        logp = logp.detach()
        needed = used(self.spec, self.behaviour, policy=logp, reference=reference, old=old, sampler=inputs.get(SAMPLER))
        if found is None:
            found = penalty_metrics(inputs[PENALTY], logp, reference, finite_or(old, logp), mask)
        beta = float(inputs[BETA]) if self.is_score else self.beta(host_beta)
        agreed = self._agreed(host_beta, count_not_finite(needed, mask), *sums_and_maxima(found, mask, beta))
        ended = self.windows[training].add(log, agreed.sums, agreed.maxima)
        if training:
            if self.accelerator.is_main_process:
                warn_if_floored(self.spec, ended)
            self.controller.observe(logp, reference, mask)
        self.applied.add("loss")

    def _agreed(
        self,
        host_beta: float,
        not_finite: Tensor,
        sums: Mapping[str, Tensor] | None = None,
        maxima: Mapping[str, Tensor] | None = None,
    ) -> Together:
        """What all ranks found; where one of them found a reason to stop, all raise the same error."""
        forbidden = float(host_beta) if self.controller.forbids(host_beta) else math.nan
        found = Found(not_finite, forbidden, self._deviation, sums or {}, maxima or {})
        self._deviation = 0.0
        agreed = together(found, self.accelerator)
        require_finite(agreed.not_finite, self.spec)
        for beta in agreed.forbidden_betas:
            self.controller.beta(beta)
        if self.state_kl is not None:
            require_head(agreed.deviation, self.state_kl.model)
        return agreed
