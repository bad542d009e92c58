"""The interface between the contract and a host: calls that run the host's real code and return what happened."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from kl_plugins.receipts import Receipt

BETA = 0.5
"""The host's coefficient of the KL term, unless a request has another one."""


@dataclass(frozen=True)
class Fault:
    """One response token whose log-prob is not finite.

    Attributes:
        whose: ``policy``, ``reference``, ``old`` or ``sampler``. The log-prob of the policy comes from its model during
            training. The others are part of the host's batch.
        value: NaN or an infinity. For the policy it is written into the logits, where +inf gives a NaN log-prob.
        rank: the rank whose data contain the token.
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
        spec: value of the host's own KL setting. None uses the host's own KL term: k3, or the closest one that it has.
        fault: a fault in the data of the last step.
        empty: the ranks on which all response tokens are masked.
        ranks: number of data-parallel processes. Each has its share of the batch, and the shares have different numbers
            of response tokens.
        micro_batches: number of micro-batches per rank and optimizer step.
        betas: the host's coefficient in each optimizer step; there are as many steps as coefficients.
        sampler: whether the batch has the sampler's log-probs and the host's settings request them.
        garbage: whether to look for objects that the last step leaves to Python's garbage collector.
    """

    spec: str | None
    fault: Fault | None = None
    empty: tuple[int, ...] = ()
    ranks: int = 1
    micro_batches: int = 1
    betas: tuple[float, ...] = (BETA,)
    sampler: bool = True
    garbage: bool = False


@dataclass(frozen=True)
class Outcome:
    """The result of a request.

    Attributes:
        errors: for each rank, the text of the error that stopped it, or None if it did not stop.
        changed: whether the last update changed at least one parameter.
        metrics: for each step, the ``kl/`` metrics that rank 0 of the host logged.
        gradient: gradient of the last step, flattened in a fixed order, float32; None if the run stopped.
        garbage: names of classes and functions of kl-plugins in the garbage of the last step, if the request asks for
            them; None if it does not.
    """

    errors: tuple[str | None, ...]
    changed: bool
    metrics: tuple[dict[str, float], ...] = ()
    gradient: Tensor | None = field(default=None, repr=False)
    garbage: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Sampled:
    """Generation settings under common names; the driver of each host translates them into the host's settings."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    raw: bool = False


@dataclass(frozen=True)
class Resumed:
    """The result of resuming from a checkpoint.

    Attributes:
        error: text of the error that stopped the resumed run, or None if it did not stop.
        saved: the next beta at the time when the checkpoint was written.
        beta: the beta of the first update after resuming; None if the run stopped.
        intact: whether the checkpoint still exists and its weights are unchanged.
    """

    error: str | None
    saved: float
    beta: float | None
    intact: bool = True


@dataclass(frozen=True)
class Program:
    """The result of a complete run of the host's own program.

    Attributes:
        status: the exit status.
        output: the standard output and standard error.
        checkpoints: names of the checkpoints that exist afterwards.
    """

    status: int
    output: str
    checkpoints: tuple[str, ...] = ()


class Driver(Protocol):
    """The calls that the checks need from a host; ``tests/support/<host>/contract_driver.py`` implements them."""

    host: str
    """``trl``, ``verl`` or ``openrlhf``."""

    key: str
    """Name of the right setting or place, which the error about a spec in a wrong setting must contain."""

    def observing(self, spec: str, probe: str = "") -> str:
        """Return the host's KL setting that trains with the host's own KL of ``Request(None)`` and observes a spec.

        Args:
            spec: the spec; empty for the one that equals the host's own KL.
            probe: ``/probe:<n>``, or empty.
        """

    def update(self, request: Request) -> Outcome:
        """Run a ``@loss`` spec through the host's update function."""

    def score(self, spec: str, fault: Fault | None = None) -> Outcome:
        """Run a ``@reward`` or ``@advantage`` spec from the host's rollout data to the advantages.

        In the result, ``changed`` says whether the host would continue with the update, and ``metrics`` has the ``kl/``
        metrics.
        """

    def refusal(self, spec: str, *, sampled: Sampled = Sampled(), sampler: bool = True, wrong_key: bool = False) -> str:
        """Return the error that refuses a configuration before a model is loaded, or an empty text if there is none.

        Args:
            spec: value of the host's own KL setting.
            sampled: generation settings.
            sampler: whether the host's settings request the engine's log-probs.
            wrong_key: whether to put the spec into a setting, or to combine it with one, where it cannot work.
        """

    def receipt(self, spec: str, *, sampled: Sampled = Sampled(), sampler: bool = True) -> Receipt:
        """Return the receipt of a run with these settings; the arguments are those of :meth:`refusal`."""

    def resume(self, before: str, after: str) -> Resumed:
        """Train some steps under the spec ``before``, write a checkpoint, and resume it under the spec ``after``."""

    def unused(self) -> tuple[Outcome, Outcome]:
        """Run one step with the host's own KL, first without kl-plugins in the process, then attached but unused."""

    def program(self) -> Program:
        """Run the host's own program under a spec whose weight divides by the sampler's log-probs; one of them is NaN.

        The NaN occurs after at least one successful update, and after a checkpoint of that update was written.
        """
