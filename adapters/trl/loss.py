"""``@loss``: the term that takes the place of TRL's own per-token KL, and what TRL does with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kl_plugins.adapters.trl.log_probs import REFERENCE, behaviour_log_probs
from kl_plugins.aggregation import Aggregation, Kind
from kl_plugins.spec import KLSpec
from kl_plugins.term import KLTerm, kl_term


def response_mask(inputs: Mapping[str, Any]) -> Tensor:
    """(B, T) bool: tokens that the policy wrote; tool output and truncated completions are left out, as TRL does."""
    mask: Tensor = inputs["completion_mask"]
    tool_mask = inputs.get("tool_mask")
    return mask.bool() if tool_mask is None else (mask * tool_mask).bool()


def loss_term(
    spec: KLSpec, source: str, inputs: Mapping[str, Any], logp: Tensor, exact: Tensor | None = None
) -> KLTerm:
    """The spec's term on one of TRL's micro-batches.

    Args:
        spec: a ``@loss`` spec.
        source: where the behaviour policy's log-probs come from.
        inputs: TRL's micro-batch.
        logp: (B, T) the policy's log-probs, nats, with their graph.
        exact: (B, T) full-vocabulary KL of the states, where the spec needs it.

    Returns:
        The term; (B, T) like the host's own KL.
    """
    mask = response_mask(inputs)
    behaviour = behaviour_log_probs(source, inputs, logp)
    return kl_term(spec, logp, inputs[REFERENCE], mask, **behaviour, exact=exact)


_KINDS: dict[str, Kind] = {
    "grpo": "sequence mean",
    "sapo": "sequence mean",
    "bnpo": "token mean",
    "dapo": "token mean",
    "cispo": "token mean",
    "vespo": "token mean",
    "dr_grpo": "constant",
    "luspo": "token sum",
}


def aggregation(algorithm: str, config: Any) -> Aggregation:
    """How TRL turns per-token terms into one number; the policy loss and the KL beside it go the same way.

    Args:
        algorithm: ``GRPO`` or ``RLOO``.
        config: its config.
    """
    if algorithm == "RLOO":
        return Aggregation("token sum", "RLOO adds up each response's log-probs")
    return Aggregation(_KINDS[config.loss_type], f"loss_type {config.loss_type}")
