"""What a trainer asks by remote call: receipts of OpenRLHF's policy workers, and the mode of its vLLM engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kl_plugins.adapters.openrlhf.settings import PROCESSED, behaviour_source, require_weights, sampling_of
from kl_plugins.adapters.ray_workers import ask
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
    import ray

    answers = ask(ray, actor_group._actor_handlers, WORKER, str(spec), behaviour_source(spec, args))
    return checked(answers, str(spec), REMEDY)


def require_processed(engines: Sequence[Any] | None, spec: KLSpec, args: Any) -> None:
    """Raise where an engine reports log-probs that a weight must not divide by.

    OpenRLHF's own program starts its engines in the right mode. A launcher of one's own may not.

    Args:
        engines: handles of OpenRLHF's ``RolloutRayActor``; None where there are none.
        spec: the ``@loss`` spec of the run.
        args: OpenRLHF's nested arguments.

    Raises:
        ValueError: the spec's weights would be wrong.
    """
    if not engines or behaviour_source(spec, args) != "sampler":
        return
    import ray

    def mode(engine: Any) -> Any:
        return engine.kwargs.get("logprobs_mode")

    modes = ray.get([engine.__ray_call__.remote(mode) for engine in engines], timeout=timeout())
    if any(found != PROCESSED for found in modes):
        require_weights(spec, args, replace(sampling_of(args), raw=True))
