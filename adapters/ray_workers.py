"""The question for a receipt, put to Ray workers by remote call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kl_plugins.adapters import probe
from kl_plugins.adapters.receipts import timeout


def ask(ray: Any, workers: Sequence[Any], module: str, spec: str, behaviour: str) -> list[dict[str, Any]]:
    """What every worker answers to :func:`kl_plugins.adapters.probe.probe`, by rank; within a time limit.

    Args:
        ray: the module, which only hosts bring along.
        workers: handles of Ray actors; each needs nothing of kl-plugins to answer.
        module: dotted module whose ``receipt`` makes the receipt, in the worker.
        spec: the spec that they should run.
        behaviour: where the behaviour policy's log-probs come from.
    """
    cloudpickle = ray.cloudpickle
    cloudpickle.register_pickle_by_value(probe)
    try:
        pending = [worker.__ray_call__.remote(probe.probe, module, spec, behaviour) for worker in workers]
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
