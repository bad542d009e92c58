"""What one trainer carries while it trains under a spec."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kl_plugins.adapters.trl import metrics
from kl_plugins.adapters.trl.beta import BetaControl
from kl_plugins.adapters.trl.exact import StateKL
from kl_plugins.adapters.trl.log_probs import Recorder, Scored, policy_and_reference
from kl_plugins.adapters.trl.loss import loss_term, response_mask
from kl_plugins.metrics import penalty_metrics
from kl_plugins.penalty import kl_penalty
from kl_plugins.receipts import Receipt
from kl_plugins.spec import KLSpec

PENALTY = "kl_plugins_penalty"
"""Key of the penalty (B, T), per unit beta, in the micro-batches that TRL buffers."""

ADVANTAGE_PENALTY = "kl_plugins_advantage_penalty"
"""The same, beta of the rollout included, for a host with one advantage per sequence."""

OLD, REFERENCE = "old_per_token_logps", "ref_per_token_logps"
"""GRPO's own keys of the rollout's and the reference's log-probs; RLOO does not keep them, so they are added there."""


@dataclass
class Session:
    """Spec, controller and records of one trainer.

    Attributes:
        spec: what the user named.
        behaviour: where the behaviour policy's log-probs come from.
        accelerator: the trainer's.
        beta: current coefficient.
        receipt: makes this process's receipt.
        state_kl: source of full-vocabulary KLs, where the spec needs them.
        recorder: the host's log-prob calls.
        applied: seams the host has gone through since the last optimizer step (``loss``) or ever (``rollout``).
    """

    spec: KLSpec
    behaviour: str
    accelerator: Any
    beta: BetaControl
    receipt: Callable[[], Receipt]
    state_kl: StateKL | None = None
    recorder: Recorder = field(default_factory=Recorder)
    applied: set[str] = field(default_factory=set)

    @property
    def is_score(self) -> bool:
        """Whether the KL sits in the rewards or advantages, not in the loss."""
        return self.spec.placement != "loss"

    def rollout_penalty(self, score_policy: Callable[[Scored], Tensor], mask: Tensor | None = None) -> Tensor:
        """(B, T) penalty of the rollout per unit beta, from the log-probs that the host has just computed.

        Args:
            score_policy: scores the same tokens under the policy, where the host did not.
            mask: (B, T) response tokens; by default the response part of the attention mask that the host scored with.
        """
        calls, exact = self.recorder.calls, None
        if self.state_kl is not None:
            exact, scored = self.state_kl.of_rollout(calls[-1], score_policy)
            policy, reference, attended = policy_and_reference(calls, lambda _: scored)
        else:
            policy, reference, attended = policy_and_reference(calls, score_policy)
        self.applied.add("rollout")
        return kl_penalty(self.spec, policy, reference, attended if mask is None else mask, exact=exact)

    def beta_times_loss(
        self, inputs: Mapping[str, Any], logp: Tensor, host_kl: Tensor, exact: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Beta times the spec's (B, T) term, in the place of the host's, and the term's metrics.

        Args:
            inputs: the host's micro-batch.
            logp: (B, T) the policy's log-probs, nats, with their graph.
            host_kl: the host's own KL, for its shape.
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
        return self.beta.value * term.loss, term.metrics

    def finish_loss(
        self,
        inputs: Mapping[str, Any],
        logp: Tensor,
        found: dict[str, Tensor] | None,
        log: MutableMapping[str, list[float]],
        training: bool,
    ) -> None:
        """Observe the KL, append the metrics and note that the seam was used; every rank, every micro-batch.

        Args:
            inputs: the host's micro-batch.
            logp: (B, T) the policy's log-probs, nats.
            found: the loss term's metrics; None for score placements, which get the penalty's.
            log: the host's metrics of this mode.
            training: False in evaluation, which moves no controller.
        """
        mask, reference = response_mask(inputs), inputs[REFERENCE]
        logp = logp.detach()
        if found is None:
            found = penalty_metrics(inputs[PENALTY], logp, reference, inputs.get(OLD), mask)
        metrics.append(log, found, mask, self.beta.value, self.accelerator)
        if training:
            self.beta.observe(logp, reference, mask)
        self.applied.add("loss")
