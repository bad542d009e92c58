"""What the contract asks of a host: a few calls that run the host's real code and say what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from kl_plugins.receipts import Receipt

BETA = 0.5
"""The host's coefficient, unless a request says otherwise."""


@dataclass(frozen=True)
class Fault:
    """One response token whose log-prob is not finite.

    Attributes:
        whose: ``policy``, ``reference``, ``old`` or ``sampler``. The policy's comes out of its model in training, the
            others are in the host's batch.
        value: NaN or an infinity. A policy's is put into the logits, where +inf becomes a NaN log-prob.
        rank: on which rank.
    """

    whose: str
    value: float
    rank: int = 0


@dataclass(frozen=True)
class Request:
    """Optimizer steps of the host's real update function on a fixed batch, from the initial weights.

    The batch holds the same sequences for every request, with responses of different lengths, advantages of 0 unless
    ``advantages`` says otherwise, and log-probs of policy, old policy, sampler and reference that all differ.

    Attributes:
        spec: in the host's own setting. None: the host's own KL (its k3, or what comes closest).
        fault: put into the last step.
        empty: ranks all of whose response tokens are masked.
        ranks: data-parallel processes; each holds its share of the batch, with another number of response tokens.
        micro_batches: number of micro-batches per rank and optimizer step.
        betas: the host's coefficient in each optimizer step; the number of steps is the length.
        sampler: the batch has the sampler's log-probs, and the host's settings say so.
    """

    spec: str | None
    fault: Fault | None = None
    empty: tuple[int, ...] = ()
    ranks: int = 1
    micro_batches: int = 1
    betas: tuple[float, ...] = (BETA,)
    sampler: bool = True


@dataclass(frozen=True)
class Outcome:
    """What a request led to.

    Attributes:
        errors: by rank, the text of the error that stopped it; None where nothing did.
        changed: the last update changed at least one parameter.
        metrics: the ``kl/`` metrics that the host logged, by step (rank 0's).
        gradient: of the last step, flattened, float32, in one fixed order; None where it stopped.
    """

    errors: tuple[str | None, ...]
    changed: bool
    metrics: tuple[dict[str, float], ...] = ()
    gradient: Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Sampled:
    """Settings of generation, in words that every host's driver translates into its own."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    raw: bool = False


@dataclass(frozen=True)
class Resumed:
    """What resuming from a checkpoint led to.

    Attributes:
        error: text of the error that stopped it, or None.
        saved: the beta that was due when the checkpoint was written.
        beta: the beta of the first update after it; None where it stopped.
        intact: the checkpoint is still there, and its weights are unchanged.
    """

    error: str | None
    saved: float
    beta: float | None
    intact: bool = True


@dataclass(frozen=True)
class Program:
    """A whole run of the host's own program.

    Attributes:
        status: its exit status.
        output: all that it printed.
        checkpoints: names of the checkpoints that it left.
    """

    status: int
    output: str
    checkpoints: tuple[str, ...] = ()


class Driver(Protocol):
    """One host."""

    host: str
    """``trl``, ``verl`` or ``openrlhf``."""

    key: str
    """What the error about a spec in the wrong key has to name: the right key or place."""

    def update(self, request: Request) -> Outcome:
        """Run a ``@loss`` spec through the host's update function."""

    def score(self, spec: str, fault: Fault | None = None) -> Outcome:
        """Run a ``@reward`` or ``@advantage`` spec from the host's rollout data to the advantages.

        ``changed`` says whether the host would go on to the update; ``metrics`` holds the ``kl/`` metrics.
        """

    def refusal(self, spec: str, *, sampled: Sampled = Sampled(), sampler: bool = True, wrong_key: bool = False) -> str:
        """The error by which the host's configuration is refused, before a model is loaded; empty where it is not.

        Args:
            spec: goes into the host's own setting.
            sampled: settings of generation.
            sampler: the host's settings ask the engine for its log-probs.
            wrong_key: put the spec into a key, or beside a setting, where it cannot work.
        """

    def receipt(self, spec: str, *, sampled: Sampled = Sampled(), sampler: bool = True) -> Receipt:
        """The receipt of a run under these settings."""

    def resume(self, before: str, after: str) -> Resumed:
        """Train some steps under one spec, write a checkpoint, and resume from it under another or the same."""

    def unused(self) -> tuple[Outcome, Outcome]:
        """The host's own KL for one step: without kl-plugins in the process, and with it attached and unused."""

    def program(self) -> Program:
        """The host's own program on a spec with a weight by the sampler's log-probs, one of which is NaN.

        It happens after at least one good update, and after a checkpoint of that was written.
        """
