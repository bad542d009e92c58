"""Receipts of every policy worker, and their controllers' state, by remote call through OpenRLHF's own actor group."""

from __future__ import annotations

from typing import Any

from kl_plugins.adapters import probe
from kl_plugins.adapters.openrlhf.settings import behaviour_source
from kl_plugins.adapters.receipts import checked, timeout
from kl_plugins.receipts import Receipt
from kl_plugins.spec import KLSpec

WORKER = "kl_plugins.patches.openrlhf.worker"
"""Where a worker's receipt is made."""

REMEDY = (
    "Install the same kl-plugins on every node, in the environment that Ray's workers run in, start the run with "
    "`kl-plugins run`, and start again."
)


def collect(actor_group: Any, spec: KLSpec, args: Any) -> list[Receipt]:
    """Ask every worker for its receipt and check them all.

    Args:
        actor_group: OpenRLHF's ``RayActorGroup`` of policy workers; its size is the number of receipts expected.
        spec: the ``@loss`` spec that they should run.
        args: OpenRLHF's nested arguments.

    Raises:
        MissingReceiptError: a worker gave none or runs something else; rank, pid and node are named.
    """
    return checked(_ask(actor_group._actor_handlers, str(spec), behaviour_source(spec, args)), str(spec), REMEDY)


def _ask(workers: list[Any], spec: str, behaviour: str) -> list[dict[str, Any]]:
    import ray
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(probe)
    try:
        pending = [worker.__ray_call__.remote(probe.probe, WORKER, spec, behaviour) for worker in workers]
    finally:
        cloudpickle.unregister_pickle_by_value(probe)
    limit = timeout()
    done, _ = ray.wait(pending, num_returns=len(pending), timeout=limit)
    return [_answer(ray, ref) if ref in done else {"error": f"no answer within {limit:g} s"} for ref in pending]


def _answer(ray: Any, ref: Any) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = ray.get(ref)
    except ray.exceptions.RayError as error:
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    return answer
