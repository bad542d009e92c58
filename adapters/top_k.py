"""The reference's most probable tokens on their way through a host: from its scoring pass to the update.

A spec with ``top:<k>`` needs 2 k + 1 numbers of the reference for each token. The pass that computes the reference's
log-probs computes them as well, in whatever process the reference runs. The host then carries them with its batch
through splitting, shuffling and padding, like the log-probs. One tensor is easier to carry than three, so they are
packed into one here, and unpacked where the policy is trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kl_plugins.reference import RefTopK

KEY = "kl_plugins_ref_top_k"
"""Name under which hosts carry the packed numbers with their batch."""

LARGEST_ID = 2**24
"""Token ids below this are exact in float32, in which they are carried."""


def runs(rows: Tensor) -> list[slice]:
    """Return each run of neighbouring rows as one slice, because a selection of rows would copy their logits.

    Args:
        rows: (N,) bool.
    """
    edges = torch.diff(
        rows.int(), prepend=rows.new_zeros(1, dtype=torch.int), append=rows.new_zeros(1, dtype=torch.int)
    )
    bounds = edges.nonzero()[:, 0].tolist()
    return [slice(start, stop) for start, stop in zip(bounds[::2], bounds[1::2], strict=True)]


def packed(reference: RefTopK) -> Tensor:
    """Put ids, log-probs and the log of the tail into one tensor.

    Args:
        reference: of any positions (...).

    Returns:
        (..., 2 k + 1) float32, detached: k ids, k log-probs in nats, and the log of the tail's probability in nats.

    Raises:
        ValueError: if a token id is not exact in float32.
    """
    ids = reference.ids
    if ids.numel() and int(ids.max()) >= LARGEST_ID:
        raise ValueError(f"kl-plugins: top: carries token ids below {LARGEST_ID}, and this vocabulary has larger ones")
    parts = (ids, reference.logp, reference.log_tail.unsqueeze(-1))
    return torch.cat([part.detach().to(torch.float32) for part in parts], -1)


def unpacked(numbers: Tensor, temperature: float = 1.0) -> RefTopK:
    """Undo :func:`packed`.

    Args:
        numbers: (..., 2 k + 1) float32, as :func:`packed` returned them. Positions that the host padded hold zeros.
        temperature: the number by which the reference's logits were divided where they were passed to
            ``reference_top_k``.

    Raises:
        ValueError: if the last dimension is not odd, or the host has changed the dtype.
    """
    size = numbers.shape[-1]
    if size % 2 == 0 or numbers.dtype != torch.float32:
        raise ValueError(
            f"kl-plugins: the reference's top-k numbers arrived as {tuple(numbers.shape)} {numbers.dtype} instead of "
            "(..., 2 k + 1) float32; the host has changed them on their way"
        )
    k = size // 2
    return RefTopK(numbers[..., :k].long(), numbers[..., k : 2 * k], numbers[..., -1], temperature)


def label_log_probs(reference: RefTopK, labels: Tensor, ref_logp: Tensor) -> Tensor:
    """Read the labels' log-probs from the kept tokens, to compare them with those that the host carried.

    The two differ if the numbers belong to other positions than the host's log-probs, or to another model. A label that
    was not kept cannot be more probable than the kept tokens, so the smallest kept log-prob is an upper limit for it.

    Args:
        reference: of the positions (...).
        labels: (...) int64 tokens.
        ref_logp: (...) log-probs of the labels under the reference as the host carried them, nats.

    Returns:
        (...) nats, float32: the kept log-prob of each label that is one of the kept tokens, else its ``ref_logp``, but
        at most the smallest kept log-prob.
    """
    found = reference.ids == labels.unsqueeze(-1)
    kept = torch.where(found, reference.logp, 0.0).sum(-1)
    return torch.where(found.any(-1), kept, torch.minimum(ref_logp.to(kept), reference.logp.amin(-1)))
