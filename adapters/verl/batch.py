"""What the tensors of veRL's micro-batches mean: masks, log-probs, and where packed tokens stand."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kl_plugins.adapters.micro_batch import LossBatch
from kl_plugins.adapters.session import Session
from kl_plugins.spec import KLSpec

SAMPLER, OLD, REFERENCE, MASK = "rollout_log_probs", "old_log_probs", "ref_log_prob", "response_mask"
"""veRL's keys: log-probs at rollout time of the sampler, the trainer and the reference, and the response tokens."""


def read(session: Session, data: Any) -> LossBatch:
    """Take the tensors out of the micro-batch of veRL's PPO loss, nested or padded.

    The mask leaves out what veRL's rejection sampling dropped.

    Args:
        session: of the worker.
        data: veRL's micro-batch.

    Raises:
        ValueError: the sampler's log-probs are asked for and missing.
    """
    spec, receipt = session.spec, session.behaviour
    given = SAMPLER in data.keys()  # noqa: SIM118  TensorDict has no plain `in`
    source = divisor(spec, receipt, given)
    if source == "sampler" and not given and session.observation is None:
        raise ValueError(
            f"kl-plugins: {spec} needs the sampler's log-probs, but the batch has no {SAMPLER}; set "
            "actor_rollout_ref.rollout.calculate_log_probs=True and use a rollout engine that returns them"
        )
    # A batch may hold log-probs that no setting asked for: the receipt says what the weight divides by.
    taken = given and (receipt != "old" or spec.behaviour is not None)
    sampler = padded(data, SAMPLER) if taken else None
    return LossBatch(session, padded(data, MASK).bool(), padded(data, OLD), sampler, source)


def padded(data: Any, key: str) -> Tensor:
    """Return a field as (B, T), padded with zeros if it is nested."""
    field: Tensor = data[key]
    return field.to_padded_tensor(0) if field.is_nested else field


def divisor(spec: KLSpec, receipt: str, given: bool) -> str:
    """Say whose log-probs the importance weight divides by: ``sampler``, ``old`` or ``unused``.

    Args:
        spec: a ``@loss`` spec.
        receipt: what the receipt says; ``automatic`` if a trainer that is not veRL's leaves it to the batch.
        given: the batch holds the sampler's log-probs.
    """
    if not spec.needs_behaviour:
        return "unused"
    if spec.behaviour is not None:
        return spec.behaviour
    if receipt == "automatic":
        return "sampler" if given else "old"
    return receipt


class Rows(NamedTuple):
    """The packed positions that predict response tokens, and where those tokens stand in the padded (B, T).

    Attributes:
        position: (n,) index into the packed tokens of the micro-batch.
        sequence: (n,) row of the padded tensors.
        step: (n,) column of the padded tensors.
    """

    position: Tensor
    sequence: Tensor
    step: Tensor


def response_rows(data: Any) -> Rows:
    """Find the positions whose next token is a response token.

    Args:
        data: veRL's micro-batch; its ``input_ids`` are prompts and responses, packed; its ``responses`` are nested, or
            (B, T) padded on the right, as the older trainer has them.
    """
    ends, lengths = data["input_ids"].offsets()[1:], _response_lengths(data)
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    step = torch.arange(len(sequence), device=lengths.device) - (lengths.cumsum(0) - lengths)[sequence]
    return Rows((ends - lengths - 1)[sequence] + step, sequence, step)


def response_spans(data: Any) -> list[tuple[int, int]]:
    """Give the same positions as :func:`response_rows`, as the first and the end of each sequence."""
    ends, lengths = data["input_ids"].offsets()[1:], _response_lengths(data)
    stops = ends - 1
    return list(zip((stops - lengths).tolist(), stops.tolist(), strict=True))


def _response_lengths(data: Any) -> Tensor:
    responses: Any = data["responses"]
    nested = responses.is_nested
    lengths: Tensor = responses.offsets().diff() if nested else _attended(data, responses.shape[1]).sum(-1)
    return lengths


def _attended(data: Any, width: int) -> Tensor:
    mask: Tensor = data["attention_mask"]
    return mask[:, -width:]
