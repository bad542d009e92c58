"""The reference's most probable tokens on their way through a host: from its scoring pass to the update.

A spec with ``top:<k>`` needs 2 k + 1 numbers of the reference for each token, and 3 m + 1 more with ``draws:<m>``. The
pass that computes the reference's log-probs computes them as well, in whatever process the reference runs. The host
then carries them with its batch through splitting, shuffling and padding, like the log-probs. One tensor is easier to
carry than several, so they are packed into one here, and unpacked where the policy is trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kl_plugins.reference import RefDraws, RefTopK
from kl_plugins.spec.grammar import numbers_per_token

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


def generator_of(labels: Tensor) -> torch.Generator:
    """Make the source of the random numbers of a reference's draws.

    Its state depends on the labels alone. So ranks that hold the same sequences draw the same tokens, a run that is
    repeated draws them again, and the host's own random numbers stay as they are.

    Args:
        labels: int64 tokens of any shape.
    """
    places = torch.arange(1, labels.numel() + 1, device=labels.device)
    mixed = (labels.reshape(-1) * 2_654_435_761 + places * 40_503) % 2_147_483_647
    seed = int((mixed * (mixed % 65_521 + 1)).sum()) if labels.numel() else 0
    return torch.Generator(labels.device).manual_seed(seed % 2**63)


def packed(reference: RefTopK) -> Tensor:
    """Put ids, log-probs and the log of the tail into one tensor.

    Args:
        reference: of any positions (...).

    Returns:
        (..., 2 k + 1) float32, detached: k ids, k log-probs in nats, and the log of the tail's probability in nats; if
        the reference has draws, 3 m + 1 more: ids, log-probs and log-rates of the draws, and the label's log-rate.

    Raises:
        ValueError: if a token id is not exact in float32.
    """
    ids = reference.tokens
    if ids.numel() and int(ids.max()) >= LARGEST_ID:
        raise ValueError(f"kl-plugins: top: carries token ids below {LARGEST_ID}, and this vocabulary has larger ones")
    parts = [reference.ids, reference.logp, reference.log_tail.unsqueeze(-1)]
    if reference.draws is not None:
        parts += [*reference.draws[:3], reference.draws.label_log_rate.unsqueeze(-1)]
    return torch.cat([part.detach().to(torch.float32) for part in parts], -1)


def unpacked(numbers: Tensor, temperature: float = 1.0, draws: int | None = None) -> RefTopK:
    """Undo :func:`packed`.

    Args:
        numbers: (..., 2 k + 1) float32, as :func:`packed` returned them, or (..., 2 k + 3 m + 2). Positions that the
            host padded hold zeros.
        temperature: the number by which the reference's logits were divided where they were passed to
            ``reference_top_k``.
        draws: m of the spec; None if it has none.

    Raises:
        ValueError: if the last dimension is of another size, or the host has changed the dtype.
    """
    m = draws or 0
    size = numbers.shape[-1] - numbers_per_token(0, m) + 1
    if size % 2 == 0 or size < 3 or numbers.dtype != torch.float32:
        expected = "2 k + 3 m + 2" if m else "2 k + 1"
        raise ValueError(
            f"kl-plugins: the reference's top-k numbers arrived as {tuple(numbers.shape)} {numbers.dtype} instead of "
            f"(..., {expected}) float32; the host has changed them on their way"
        )
    k = size // 2
    given = None
    if m:
        ids, logp, log_rate, own = torch.split(numbers[..., size:], [m, m, m, 1], -1)
        given = RefDraws(ids.long(), logp, log_rate, own[..., 0])
    return RefTopK(numbers[..., :k].long(), numbers[..., k : 2 * k], numbers[..., 2 * k], temperature, given)


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
