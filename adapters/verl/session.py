"""What one veRL worker carries while it trains under a ``@loss`` spec, and the receipts of all workers."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kl_plugins.adapters import receipts, session
from kl_plugins.adapters.controller import Controller
from kl_plugins.adapters.micro_batch import LossBatch
from kl_plugins.adapters.session import Total
from kl_plugins.adapters.verl import HOST, LOSS_BETA, LOSS_KEY, REMEDY
from kl_plugins.adapters.verl.config import spec_in
from kl_plugins.adapters.verl.exact import Pending
from kl_plugins.adapters.verl.metrics import worker_metrics
from kl_plugins.adapters.verl.observe import observed_in
from kl_plugins.receipts import Receipt
from kl_plugins.sampling import Sampling
from kl_plugins.spec import KLSpec
from kl_plugins.spec.observation import Observation

ATTRIBUTE = "_kl_plugins"
"""Attribute of a training worker that holds its session; absent on workers that train as veRL alone does."""


@dataclass
class Session(session.Session):
    """The shared session, for one loss function of veRL.

    Attributes:
        loss_fn: veRL's loss function that it belongs to.
        misplaced: by how much the reference's top-k numbers of the current step are off those of their tokens, nats.
        pending: what the current micro-batch needs beside the policy's log-probs, under ``top:``.
    """

    behaviour: str = "automatic"
    loss_fn: Any = None
    misplaced: float = 0.0
    pending: Pending | None = field(default=None, repr=False)

    def start_step(self) -> None:
        """Drop what an optimizer step that was broken off has left."""
        super().start_step()
        self.misplaced, self.pending = 0.0, None

    def check_step(self, total: Total) -> None:
        """Look at everything that an optimizer step is made of, just before the step, and advance beta.

        Args:
            total: sums a vector over the ranks.

        Raises:
            RuntimeError: on all ranks; the reference's top-k numbers are not those of their tokens on one of them.
            LogProbError, BetaChangedError: see :meth:`check`.
        """
        if self.spec.top is None:
            self.check(total)
            return
        ranks, *_ = self.check(total, torch.tensor([float(self.misplaced > 0)]))
        if ranks:
            own = f" (on this rank by {self.misplaced:.3g} nats on average)" if self.misplaced else ""
            if math.isinf(self.misplaced):
                own = " (on this rank there are not as many numbers as tokens)"
            raise RuntimeError(
                f"kl-plugins: on {int(ranks)} ranks the reference's top-k numbers do not belong to the tokens that "
                f"they came with: their log-probs differ from ref_log_prob{own}. Between the reference's pass and the "
                "update something has moved rows or tokens, or changed the reference"
            )

    def config_with_beta(self, config: Any) -> Any:
        """Return veRL's actor config with the current beta as its coefficient; without a schedule, the same object.

        veRL's coefficient is read each time, because a program may change it.
        """
        beta = self.coefficient(config.kl_loss_coef)
        if self.controller.schedule is None:
            return config
        config = copy.copy(config)
        object.__setattr__(config, "kl_loss_coef", beta)  # veRL's dataclasses are frozen
        return config

    def metrics(self, batch: LossBatch, make: Callable[[str, float], Any]) -> dict[str, Any]:
        """Return the metrics of a micro-batch whose term was computed, in the form in which veRL carries them.

        Args:
            batch: the micro-batch.
            make: builds veRL's metric object; see :func:`kl_plugins.adapters.verl.metrics.worker_metrics`.
        """
        if batch.metrics is None:
            raise RuntimeError(f"kl-plugins: {self.spec} was not computed")
        return worker_metrics(batch.metrics, batch.mask, self.applied, make)


def loss_elsewhere() -> torch.device | None:
    """Return the device of this process if it is a stage of Megatron's pipeline that computes no loss, else None."""
    stages = sys.modules.get("megatron.core.parallel_state")
    if stages is None or not stages.model_parallel_is_initialized():
        return None
    if stages.is_pipeline_last_stage(ignore_virtual=True):
        return None
    from verl.utils.device import get_device_id, get_device_name

    name = get_device_name()
    return torch.device(name) if name == "cpu" else torch.device(name, get_device_id())


def session_of(worker: Any) -> Session | None:
    """Return the session of a worker's present loss function, or None where it trains as veRL alone does."""
    loss_fn = getattr(worker, "loss_fn", None)
    config = getattr(loss_fn, "keywords", {}).get("config")
    if config is None or not getattr(config, "use_kl_loss", False):
        return None
    text = getattr(config, "kl_loss_type", None)
    seen = observed_in(LOSS_KEY, text)
    spec = spec_in(LOSS_KEY, text) if seen is None else seen.observation.measured
    if spec is None:
        return None
    found: Session | None = vars(worker).get(ATTRIBUTE)
    if found is None or found.loss_fn is not loss_fn:
        controller = Controller(spec.beta, float(config.kl_loss_coef), LOSS_BETA)
        found = Session(HOST, spec, controller, observation=None if seen is None else seen.observation, loss_fn=loss_fn)
        setattr(worker, ATTRIBUTE, found)
    return found


def collect(
    worker_group: Any, spec: KLSpec | Observation, behaviour: str = "automatic", sampling: Sampling | None = None
) -> list[Receipt]:
    """Ask every worker of the actor for its receipt, check them, log them.

    Args:
        worker_group: veRL's ``RayWorkerGroup``; its world size is the number of receipts expected.
        spec: the ``@loss`` spec that they should run, or what they should observe.
        behaviour: where the behaviour policy's log-probs come from; ``automatic``: whatever a batch holds.
        sampling: how responses are sampled, which the trainer knows and the workers do not.

    Raises:
        MissingReceiptError: a worker gave none or runs something else; rank, pid and node are named.
    """
    import ray

    found = receipts.collect(ray, worker_group.workers, HOST, spec, behaviour, REMEDY)
    if sampling is not None:
        caveats = sampling.caveats(spec.measured if isinstance(spec, Observation) else spec, behaviour)
        found = [replace(one, sampling=str(sampling), caveats=(*one.caveats, *caveats)) for one in found]
    for receipt in found:
        receipts.announce(receipt)
    return found


def require_reference(worker_group: Any, spec: KLSpec | Observation, behaviour: str) -> None:
    """Ask every worker of the reference for its receipt, where other workers than the actor's hold the reference.

    Args:
        worker_group: veRL's ``RayWorkerGroup`` of the reference.
        spec: a ``@loss`` spec with ``top:``, or an observation of one.
        behaviour: where the behaviour policy's log-probs come from.

    Raises:
        MissingReceiptError: a worker gave none; rank, pid and node are named.
    """
    import ray

    receipts.collect(ray, worker_group.workers, HOST, spec, behaviour, REMEDY)
