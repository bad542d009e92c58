"""Checks of log-probs: those that the host passes are finite, and those that we compute are equal to the host's.

A rank that raised alone would leave the others waiting in their next collective. So each rank counts, the counts are
summed over ranks, and then all ranks raise the same error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kl_plugins.spec import KLSpec

POLICY, REFERENCE, OLD, SAMPLER = "policy", "reference", "old policy", "sampler"
NAMES = (POLICY, REFERENCE, OLD, SAMPLER)
"""The policies whose log-probs are checked, in the order of the counts."""

MEAN_DEVIATION, MEAN_DEVIATION_16_BIT = 1e-3, 0.1
"""Largest mean absolute difference that rounding can explain, nats."""

_REMEDIES = {
    POLICY: "The policy has probably diverged: resume from the last checkpoint with a smaller learning rate.",
    REFERENCE: "Check the weights and the dtype of the reference model.",
    OLD: "The policy has probably diverged: resume from the last checkpoint with a smaller learning rate.",
    SAMPLER: (
        "Make the rollout engine return the log-prob of every sampled token (processed_logprobs), or use "
        "behaviour:old in the spec."
    ),
}


class LogProbError(ValueError):
    """Raised on every rank, before the update, if log-probs that the spec needs are not finite."""


def used(
    spec: KLSpec, source: str, *, policy: Tensor, reference: Tensor, old: Tensor | None, sampler: Tensor | None
) -> dict[str, Tensor]:
    """Return the log-probs that enter the regulariser, by name. Log-probs that only metrics use do not stop a run.

    Args:
        spec: what the user named.
        source: whose log-probs the importance weight divides by: ``sampler`` or ``old``; anything else means none.
        policy, reference, old, sampler: (B, T) nats; None if the host has none.
    """
    found = {POLICY: policy, REFERENCE: reference}
    behaviour = {"old": (OLD, old), "sampler": (SAMPLER, sampler)}.get(source) if spec.needs_behaviour else None
    if behaviour is not None and behaviour[1] is not None:
        found[behaviour[0]] = behaviour[1]
    return found


def count_not_finite(log_probs: Mapping[str, Tensor], mask: Tensor) -> Tensor:
    """Count the response tokens whose log-prob is not finite. Nothing is read back from the device.

    Args:
        log_probs: (B, T) nats, by name; see :data:`NAMES`.
        mask: (B, T), True on response tokens.

    Returns:
        (5,) int64: one count for each of :data:`NAMES` (0 where it was not given), then the response tokens. Counts of
        micro-batches and ranks add up.
    """
    mask = mask.bool()
    none = mask.sum() * 0
    counts = [(~torch.isfinite(log_probs[name].detach()) & mask).sum() if name in log_probs else none for name in NAMES]
    return torch.stack([*counts, mask.sum()])


def require_finite(counts: Tensor | Sequence[float], spec: KLSpec) -> None:
    """Raise if a log-prob is not finite.

    Args:
        counts: what :func:`count_not_finite` gave, summed over everything that is trained on together, on all ranks.
        spec: what the user named.

    Raises:
        LogProbError: whose log-probs, on how many of how many response tokens, and what to do.
    """
    *unknown, tokens = (int(number) for number in (counts.tolist() if isinstance(counts, Tensor) else counts))
    bad = {name: number for name, number in zip(NAMES, unknown, strict=True) if number}
    if not bad:
        return
    first = next(iter(bad))  # a broken policy breaks the others, so NAMES begins with it
    what = " and ".join(f"the log-probs of the {name} on {number}" for name, number in bad.items())
    raise LogProbError(
        f"kl-plugins: {what} of {tokens} response tokens are not finite (NaN or infinite), so {spec} has no value "
        f"there. All ranks stop before the update, and checkpoints are not affected. {_REMEDIES[first]}"
    )


def finite_or(log_probs: Tensor | None, instead: Tensor) -> Tensor | None:
    """Replace the log-probs that are not finite by others. For log-probs that only metrics use.

    Args:
        log_probs: (B, T) nats, or None.
        instead: (B, T) nats; the replacements.
    """
    return None if log_probs is None else torch.where(torch.isfinite(log_probs), log_probs, instead.to(log_probs))


def disagreement(ours: Tensor, host: Tensor, mask: Tensor, rounded: bool) -> float | None:
    """Compare log-probs that were computed for exact terms with the host's own of the same tokens.

    Args:
        ours: (B, T) nats.
        host: (B, T) nats.
        mask: (B, T) bool or 0/1; elsewhere both may be anything.
        rounded: the host computed in 16 bits.

    Returns:
        The mean absolute difference over the tokens of the batch if rounding cannot explain it, else None.
    """
    mask = mask.bool()
    difference = (ours.detach().float() - host.detach().float()).abs().masked_fill(~mask, 0.0)
    mean = float(difference.sum() / mask.sum().clamp(min=1))
    return None if mean <= (MEAN_DEVIATION_16_BIT if rounded else MEAN_DEVIATION) else mean
