"""Hooks for specs with ``top:``: the pass that scores a batch under the reference also gives its most probable tokens.

The trainer's hook puts a note into the batch that it sends to the reference's workers, whichever these are. The
workers' hook reads the note, and veRL carries what it adds to their output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from kl_plugins.adapters.top_k import KEY
from kl_plugins.adapters.verl.top_k import ASKED, DRAWS_ASKED, Recorder, keep, missing
from kl_plugins.patches.engine.arguments import Function, arguments
from kl_plugins.patches.engine.instead import instead
from kl_plugins.patches.verl.trainer import session_of
from kl_plugins.patches.verl.worker import SHOW, log_probs_in_32_bits


def infer_batch(wrapped: Function, worker: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around a worker's pass without gradients: where the batch asks for them, its top-k numbers come with it."""
    from verl.utils import tensordict_utils

    data = arguments(wrapped, args, kwargs)["data"]
    # The v1 trainers send a critic the names of rows, and veRL fetches these inside of its function.
    k = tensordict_utils.pop(data, ASKED) if isinstance(data, tensordict_utils.TensorDict) else None
    if k is None:
        return wrapped(*args, **kwargs)
    draws = tensordict_utils.pop(data, DRAWS_ASKED)
    tensordict_utils.assign_non_tensor(data, **{SHOW: True})
    infer = worker.engine.infer_batch

    def recording(data: Any, loss_function: Any = None) -> Any:
        return infer(data, loss_function=Recorder(k, log_probs_in_32_bits, draws))

    with instead(worker.engine, "infer_batch", recording):
        return wrapped(*args, **kwargs)


def compute_ref_log_prob(wrapped: Function, trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around the trainer's call of the reference's workers: under ``top:`` they are asked for more than log-probs."""
    session = session_of(trainer)
    spec = None if session is None else session.of_reference
    if session is None or spec is None:
        return wrapped(*args, **kwargs)
    batch = arguments(wrapped, args, kwargs)["batch"]
    # The older trainer's batch is a DataProto, the v1 trainers' names rows of veRL's TransferQueue.
    older = hasattr(batch, "meta_info")
    notes = batch.meta_info if older else batch.extra_info
    group, method = trainer.ref_policy_wg, "compute_ref_log_prob"
    if trainer.ref_in_actor:
        group, method = trainer.actor_rollout_wg, "compute_log_prob"
    outputs: list[Any] = []

    def called(call: Callable[..., Any], *given: Any, **named: Any) -> Any:
        outputs.append(call(*given, **named))
        return outputs[-1]

    asked = {ASKED: spec.top} if spec.draws is None else {ASKED: spec.top, DRAWS_ASKED: spec.draws}
    notes.update(asked)
    try:
        with instead(group, method, partial(called, getattr(group, method))):
            result = wrapped(*args, **kwargs)
    finally:
        for name in asked:
            notes.pop(name, None)
    if len(outputs) != 1 or KEY not in (outputs[0].keys() if older else outputs[0].fields):
        if session.observed is None:
            raise missing(spec)
        return result  # an observation does not stop a run; its workers say what is missing
    if older:
        session.kept = keep(outputs[0], result)
    return result
