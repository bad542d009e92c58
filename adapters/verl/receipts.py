"""Receipts of every worker, asked for by remote call through veRL's own worker group."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kl_plugins.adapters.ray_workers import ask
from kl_plugins.adapters.receipts import announce, checked
from kl_plugins.receipts import Receipt
from kl_plugins.sampling import Sampling
from kl_plugins.spec import KLSpec

WORKER = "kl_plugins.patches.verl.worker"
"""Where a worker's receipt is made."""

REMEDY = "Install the same kl-plugins on every node, in the environment that veRL's workers run in, and start again."


def collect(
    worker_group: Any, spec: KLSpec, behaviour: str = "automatic", sampling: Sampling | None = None
) -> list[Receipt]:
    """Ask every worker for its receipt, check them, log them.

    Args:
        worker_group: veRL's ``RayWorkerGroup``; its world size is the number of receipts expected.
        spec: the ``@loss`` spec that they should run.
        behaviour: where the behaviour policy's log-probs come from; ``automatic``: whatever a batch holds.
        sampling: how responses are sampled, which the trainer knows and the workers do not.

    Raises:
        MissingReceiptError: a worker gave none or runs something else; rank, pid and node are named.
    """
    import ray

    receipts = checked(ask(ray, worker_group.workers, WORKER, str(spec), behaviour), str(spec), REMEDY)
    if sampling is not None:
        caveats = sampling.caveats(spec, behaviour)
        receipts = [replace(one, sampling=str(sampling), caveats=(*one.caveats, *caveats)) for one in receipts]
    for receipt in receipts:
        announce(receipt)
    return receipts
