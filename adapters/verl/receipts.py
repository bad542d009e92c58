"""Receipts of every worker, asked for by remote call through veRL's own worker group."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from kl_plugins.adapters.verl import probe
from kl_plugins.receipts import MissingReceiptError, Receipt, check_receipts
from kl_plugins.spec import KLSpec

logger = logging.getLogger(__name__)

TIMEOUT_VARIABLE = "KL_PLUGINS_RECEIPT_TIMEOUT"
DEFAULT_TIMEOUT = 300.0
"""Seconds for all workers to answer; they may still be loading their model."""


def announce(receipt: Receipt) -> None:
    """Log the receipt's line; veRL logs warnings only, so elsewhere it goes to standard error."""
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info("%s", receipt.line())
    else:
        print(receipt.line(), file=sys.stderr, flush=True)


def collect(worker_group: Any, spec: KLSpec, behaviour: str = "automatic") -> list[Receipt]:
    """Ask every worker for its receipt, check them, log them.

    Args:
        worker_group: veRL's ``RayWorkerGroup``; its world size is the number of receipts expected.
        spec: the ``@loss`` spec that they should run.
        behaviour: where the behaviour policy's log-probs come from; ``automatic``: whatever a batch holds.

    Raises:
        MissingReceiptError: a worker gave none or runs something else; rank, pid and node are named.
    """
    receipts, problems = [], []
    for rank, answer in enumerate(_ask(worker_group.workers, str(spec), behaviour)):
        if "receipt" in answer:
            receipts.append(Receipt.from_dict(answer["receipt"]))
        else:
            whereabouts = f" (pid {answer['pid']} on {answer['node']})" if "pid" in answer else ""
            problems.append(f"rank {answer.get('rank', rank)}{whereabouts}: {answer['error']}")
    if problems:
        raise MissingReceiptError(
            f"kl-plugins: no receipt from {len(problems)} of {worker_group.world_size} workers:\n  "
            + "\n  ".join(problems)
            + f"\nThey would train without {spec}. Install the same kl-plugins on every node, in the environment "
            "that veRL's "
            "workers run in, and start again."
        )
    check_receipts(receipts, worker_group.world_size)
    for receipt in receipts:
        announce(receipt)
    return receipts


def _ask(workers: list[Any], spec: str, behaviour: str) -> list[dict[str, Any]]:
    import ray
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(probe)
    try:
        pending = [worker.__ray_call__.remote(probe.probe, spec, behaviour) for worker in workers]
    finally:
        cloudpickle.unregister_pickle_by_value(probe)
    limit = float(os.environ.get(TIMEOUT_VARIABLE, DEFAULT_TIMEOUT))
    done, _ = ray.wait(pending, num_returns=len(pending), timeout=limit)
    return [_answer(ray, ref) if ref in done else {"error": f"no answer within {limit:g} s"} for ref in pending]


def _answer(ray: Any, ref: Any) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = ray.get(ref)
    except ray.exceptions.RayError as error:
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    return answer
