"""What TRL's tensors mean: the log-probs that it computes, its micro-batches, and the term in the place of its KL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from kl_plugins.adapters.log_probs import count_not_finite, finite_or, used
from kl_plugins.adapters.micro_batch import LossBatch
from kl_plugins.adapters.observe import warn_not_of_these_tokens
from kl_plugins.adapters.top_k import KEY
from kl_plugins.adapters.trl import HOST
from kl_plugins.adapters.trl.exact import AGREED, StepKL, cells_in
from kl_plugins.adapters.trl.session import Session
from kl_plugins.adapters.trl.top_k import Kept
from kl_plugins.metrics import penalty_metrics
from kl_plugins.observed import observed
from kl_plugins.probe import HostTerm
from kl_plugins.spec import KLSpec

OLD, REFERENCE, SAMPLER = "old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps"
"""GRPO's own keys of a micro-batch. RLOO keeps none of them, so the first two are added there."""

PENALTY = "kl_plugins_penalty"
"""Key of the penalty (B, T), per unit beta, in the micro-batches that TRL buffers."""

ADVANTAGE_PENALTY = "kl_plugins_advantage_penalty"
"""Key of the penalty times the rollout's beta, where one importance ratio per sequence multiplies the advantages."""

BETA = "kl_plugins_beta"
"""Key of the beta that was applied to the rollout; a 0-d tensor, which TRL neither splits nor shuffles."""


def response_mask(inputs: Mapping[str, Any]) -> Tensor:
    """Return (B, T) bool: the tokens that the policy wrote.

    Tool output and truncated completions are left out, as in TRL.

    Args:
        inputs: TRL's micro-batch or rollout.
    """
    mask: Tensor = inputs["completion_mask"]
    tool_mask = inputs.get("tool_mask")
    return mask.bool() if tool_mask is None else (mask * tool_mask).bool()


def named(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Name the arguments of TRL's log-prob function.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
    """
    return dict(zip(("model", "input_ids", "attention_mask", "logits_to_keep"), args, strict=False)) | dict(kwargs)


class Scored(NamedTuple):
    """One call of TRL's log-prob function: its result (B, T) in nats, and its arguments."""

    logp: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def response_mask(self) -> Tensor:
        """Return (B, T) bool: the response part of the attention mask that TRL scored with."""
        given = named(self.args, self.kwargs)
        mask: Tensor = given["attention_mask"]
        return mask[:, -given["logits_to_keep"] :].bool()


class Calls:
    """Something during which TRL computes log-probs; while it is entered, the hook notes every call here.

    Attributes:
        session: of the trainer.
        calls: in the order in which TRL made them.
    """

    session: Session
    calls: list[Scored]

    def scoring(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Return what is entered while TRL makes one call.

        Args:
            args: positional arguments of the call.
            kwargs: its keyword arguments.
        """
        return nullcontext()

    def note(self, scored: Scored) -> None:
        """Keep one call.

        Args:
            scored: the call.
        """
        self.calls.append(scored)


class RolloutCalls(Calls):
    """The scoring of a rollout: under ``top:``, the pass of the reference also gives its most probable tokens.

    Attributes:
        numbers: (B, T, 2 k + 1) what :func:`kl_plugins.adapters.trl.top_k.top_k_of_states` gave; None without ``top:``.
    """

    numbers: Tensor | None = None

    @contextmanager
    def scoring(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Within the block, TRL makes one call; if it scores the reference, its numbers are kept.

        Args:
            args: positional arguments of the call.
            kwargs: its keyword arguments.
        """
        source = self.session.states
        if source is None:
            yield
            return
        given = named(args, kwargs)
        with source.recording(given["model"], given["logits_to_keep"]) as recorded:
            yield
        if recorded:
            self.numbers = torch.cat(recorded)

    def kept(self) -> Kept | None:
        """Return what was recorded of the reference; None without ``top:``.

        Raises:
            RuntimeError: TRL did not score the reference.
        """
        spec = self.session.spec
        if spec.top is None:
            return None
        if self.numbers is None:
            raise RuntimeError(
                f"kl-plugins: the reference's forward pass was not seen while TRL scored a rollout, so {spec} has none "
                "of its most probable tokens; this trainer is not one that kl-plugins knows. Leave top: out, or use a "
                "sampled spec, such as k2@loss/is:token"
            )
        return Kept(self.numbers, self.calls[-1].logp, spec.draws)


@dataclass
class Recording(RolloutCalls):
    """A rollout of a ``@loss`` spec with ``top:``, or one that is observed.

    Attributes:
        session: of the trainer.
        calls: TRL's log-prob calls; the last one scored the reference.
    """

    session: Session
    calls: list[Scored] = field(default_factory=list)

    def keep(self, output: dict[str, Any]) -> dict[str, Any]:
        """Put what the updates need of the reference into a rollout; TRL splits and shuffles it with the rest.

        Args:
            output: TRL's rollout.

        Returns:
            The rollout. An observed one may go without, because the coefficient can be set to 0 during the run.
        """
        kept = self.kept() if self.session.observation is None else None
        numbers = self.numbers if kept is None else kept.numbers
        if numbers is not None:
            output[KEY] = numbers
        return output

    def keep_log_probs(self, output: dict[str, Any]) -> dict[str, Any]:
        """Put the log-probs of policy and reference into a rollout, which RLOO does not keep.

        Args:
            output: TRL's rollout.

        Returns:
            The rollout.
        """
        if len(self.calls) == 2:  # otherwise TRL scored no reference
            output[OLD], output[REFERENCE] = self.calls[0].logp, self.calls[-1].logp
        return output


@dataclass
class UnchangedRandomness(Recording):
    """A rollout that is observed although beta is 0: TRL alone would not score the reference."""

    @contextmanager
    def scoring(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Within the block, TRL makes one call; one with the adapter off draws no random number that others miss.

        Args:
            args: positional arguments of the call.
            kwargs: its keyword arguments.
        """
        model = named(args, kwargs)["model"]
        with super().scoring(args, kwargs):
            if not any(getattr(module, "disable_adapters", False) is True for module in model.modules()):
                yield
                return
            device = next(model.parameters()).device
            with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
                yield


@dataclass
class MicroBatch(LossBatch, Calls):
    """A micro-batch on its way through ``_compute_loss``, under a spec of any placement.

    Attributes:
        session: of the trainer.
        inputs: TRL's micro-batch, for its ``_compute_loss``.
        averaged: see :func:`per_sequence`.
        calls: TRL's log-prob calls; the last one scored the policy.
        states: KLs of the states of the policy's forward passes, where the spec needs them.
        kept: what was recorded of the reference, under ``top:``.
    """

    loss: ClassVar[str] = "_compute_loss"

    session: Session
    inputs: dict[str, Any] = field(default_factory=dict)
    averaged: bool = False
    calls: list[Scored] = field(default_factory=list)
    states: list[StepKL] = field(default_factory=list)
    kept: Kept | None = None
    _advantages: Tensor | None = None

    @classmethod
    def of(cls, session: Session, inputs: dict[str, Any], averaged: bool) -> MicroBatch:
        """Read TRL's micro-batch.

        Args:
            session: of the trainer.
            inputs: TRL's micro-batch.
            averaged: see :func:`per_sequence`.

        Raises:
            ValueError: the sampler's log-probs are missing.
        """
        source, old, sampler = session.behaviour, inputs.get(OLD), inputs.get(SAMPLER)
        if session.observation is not None:
            return cls(session, response_mask(inputs), old, sampler, source, inputs=inputs)
        if source == "sampler" and sampler is None:
            raise ValueError(
                "kl-plugins: the sampler's log-probs were expected, but TRL handed none over; return 'logprobs' from "
                "rollout_func, or say behaviour:old in the spec"
            )
        # If a weight divides by one of them, the term gets no other; else both serve the metrics.
        old = None if source == "sampler" else old
        sampler = sampler if source in ("sampler", "unused") else None
        batch = cls(session, response_mask(inputs), old, sampler, source, inputs=inputs, averaged=averaged)
        if ADVANTAGE_PENALTY in inputs:
            # Held back until the policy's log-probs are there: code that reads it earlier fails instead of going
            # without the penalty.
            batch.inputs = dict(inputs)
            batch._advantages = batch.inputs.pop("advantages")
        return batch

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within the block, the policy's forward pass also gives the KL of the states that a ``@loss`` spec needs."""
        source = self.session.states
        if source is None or self.session.is_score:
            yield
            return
        spec, observed = self.session.spec, self.session.observation is not None
        if observed and not (KEY in self.inputs and REFERENCE in self.inputs):
            yield  # an observation does not stop a run
            return
        self.kept = None if spec.top is None else Kept.of(self.inputs, self.inputs[REFERENCE], spec.draws)
        if self.kept is not None:
            self.kept = self.kept._replace(probed=self.session.probing)
        with source.watching(self.mask.shape[1], spec.estimator == "exact" and not observed, self.kept) as self.states:
            yield

    def take_states(self) -> None:
        """Take what an observed spec with ``top:`` needs from the passes of the loss that TRL has just computed.

        Nothing is taken if the reference's numbers turn out to belong to other tokens. Then no token of the micro-batch
        is measured.
        """
        source, observation = self.session.states, self.session.observation
        if source is None or observation is None:
            return
        scored = self.calls[-1] if self.states else None
        found = scored and source.joined(self.states, scored.logp.detach(), scored.response_mask(), self.kept)
        if found is None or found.deviation != AGREED:
            warn_not_of_these_tokens(HOST.title, observation)
            return
        self.exact, self.remainder, self.cells = found.kl, found.remainder, cells_in(self.states)

    def note(self, scored: Scored) -> None:
        """Keep one call; put the advantages back, with the penalty, where they were held back.

        Args:
            scored: the call; it scored the policy.
        """
        super().note(scored)
        if self._advantages is not None:
            self.inputs["advantages"] = per_sequence(
                self._advantages, self.inputs[ADVANTAGE_PENALTY], scored.logp, self.mask, averaged=self.averaged
            )

    def times_beta(self, host_kl: Tensor) -> Tensor:
        """Return beta times the spec's (B, T) term, in the place of TRL's own; 0 for scores.

        Args:
            host_kl: TRL's own KL, for its shape.

        Raises:
            RuntimeError: TRL's KL has another shape, so TRL would aggregate ours in another way.
        """
        session, scored = self.session, self.calls[-1]
        if session.is_score:
            return host_kl.new_zeros(())
        if session.states is not None:
            self.exact, self.remainder, session.deviation = session.states.joined(
                self.states, scored.logp, scored.response_mask(), self.kept
            )
        if self.source != "sampler" and self.old_logp is None:
            self.old_logp = scored.logp.detach()  # TRL drops the old log-probs where they equal the policy's
        loss = self.term(scored.logp, self.inputs[REFERENCE])
        if host_kl.shape != loss.shape:
            raise RuntimeError(
                f"kl-plugins: TRL's per-token KL has shape {tuple(host_kl.shape)}, the spec's term "
                f"{tuple(loss.shape)}; this loss aggregates the KL in a way that kl-plugins does not know"
            )
        return session.applied * loss

    def observe_policy(self, native: KLSpec | None) -> None:
        """Measure the observed spec on the log-probs that TRL has just computed, and change nothing.

        Args:
            native: the spec whose gradient TRL's own KL has; None if there is none.
        """
        if not self.calls:
            return
        logp, reference = self.calls[-1].logp.detach(), self.inputs.get(REFERENCE)
        if reference is None:  # the coefficient was set to 0 during the run, so TRL scored no reference
            reference = torch.full_like(logp, torch.nan)
        if self.old_logp is None:
            self.old_logp = logp  # TRL drops the old log-probs where they equal the policy's
        if self.source == "current":
            self.source = "old"
        host = None
        if native is not None and self.session.probing:
            own = observed(native, logp, reference, self.mask, old_logp=self.old_logp, sampler_logp=self.sampler_logp)
            # In the loss TRL clamps nothing, so its gradient is the coefficient.
            host = HostTerm(own.coefficient, own.coefficient if native.placement == "loss" else None)
        self.observe(logp, reference, host)

    def finish(self, log: MutableMapping[str, list[float]]) -> None:
        """Check the log-probs and log the metrics; on every rank, for every micro-batch, before backward.

        Args:
            log: TRL's metrics of this mode.

        Raises:
            LogProbError: a log-prob that the spec needs is not finite, on any rank.
            BetaChangedError: the host's coefficient was changed against the spec's schedule, on any rank.
        """
        session, reference = self.session, self.inputs.get(REFERENCE)
        beta = session.applied
        if session.observation is not None:
            if self.metrics is None:
                return
            logp = self.calls[-1].logp.detach()
            session.add(count_not_finite({}, self.mask), logp, logp, self.mask)  # a check that always passes
        elif self.metrics is None:
            assert reference is not None
            logp, beta = self.calls[-1].logp.detach(), float(self.inputs[BETA])
            old = finite_or(self.old_logp, logp)
            self.metrics = penalty_metrics(self.inputs[PENALTY], logp, reference, old, self.mask)
            entering = used(session.spec, self.source, policy=logp, reference=reference, old=None, sampler=None)
            session.add(count_not_finite(entering, self.mask), logp, reference, self.mask)
        session.conclude(self.metrics, self.mask, beta, log)


def per_sequence(advantages: Tensor, penalty: Tensor, logp: Tensor, mask: Tensor, *, averaged: bool = False) -> Tensor:
    """Put the penalty into advantages, for a host that multiplies one importance ratio with one advantage per sequence.

    The values of the result are the host's advantages. Its gradient is that of the penalty as a per-token advantage:
    the host's ``-ratio * advantage`` then contributes ``ratio * sum_t penalty_t * grad log pi_t``, with the ratio
    clipped where the host clips it for the task's advantage (half way between the two where that advantage is 0).

    Args:
        advantages: (B,) normalised.
        penalty: (B, T), beta included, nats.
        logp: (B, T) the policy's log-probs, nats, with their graph.
        mask: (B, T) bool.
        averaged: the ratio is that of the mean log-prob, and the host repeats its product with the advantage on every
            token (GRPO); else it is that of the sum, and the product counts once (RLOO).

    Returns:
        (B,).
    """
    # where, not a product: a padded log-prob may be anything.
    live = (logp - logp.detach()).masked_fill(~mask, 0.0)
    total = (penalty.to(live) * live).sum(-1)
    return advantages - (total / mask.sum(-1).clamp(min=1) if averaged else total)
