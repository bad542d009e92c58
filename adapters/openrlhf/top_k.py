"""What ``top:`` keeps of the reference, on its way through OpenRLHF: from the reference actor to the training step.

The numbers of a sequence are one array, with one row per response token. OpenRLHF pads the fields of an ``Experience``
along their last dimension, which would mix up the numbers of a token. So they travel in ``info``, as a list with one
array per sequence. OpenRLHF splits and merges such a list together with the sequences, and changes nothing inside.

The numbers leave the reference actor as NumPy arrays, because Ray sends arrays faster than tensors. It copies the
memory of an array as it is, and the receiver reads it in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kl_plugins.adapters.openrlhf.shared_sequences import held
from kl_plugins.adapters.top_k import KEY, generator_of, packed, runs
from kl_plugins.spec import KLSpec
from kl_plugins.top_k import reference_of, tokens_in_runs

Numbers = np.ndarray[tuple[int, int], np.dtype[np.float32]]
"""(n, 2 k + 1) of n response tokens, as :func:`reference_numbers` computes them."""


def reference_numbers(
    logits: Tensor,
    logp: Tensor,
    sequences: Tensor,
    action_mask: Tensor,
    attention_mask: Tensor,
    k: int,
    draws: int | None = None,
) -> Tensor:
    """Compute what ``top:`` keeps of the reference in the states that the response tokens were drawn in.

    Args:
        logits: (B, L, V) of the reference, scaled by the temperature; (1, N, V) where OpenRLHF packs the sequences; of
            the part that :func:`~kl_plugins.adapters.openrlhf.shared_sequences.held` describes.
        logp: (B, A) OpenRLHF's log-probs of the response tokens, computed from these logits, nats, float32.
        sequences: (B, L) tokens.
        action_mask: (B, A) response tokens.
        attention_mask: (B, L) tokens that are no padding.
        k: number of tokens to keep.
        draws: number of tokens to draw; None for none.

    Returns:
        (n, 2 k + 1) float32, or (n, 2 k + 3 m + 2) with m draws, for the n response tokens that belong to the logits
        here, as ``adapters.top_k.packed`` packs them.
    """
    mask = action_mask.bool()
    here = held(mask, attention_mask, logits.shape[:-1])
    labels, own = sequences[:, -mask.shape[1] :][mask][here.tokens], logp[mask][here.tokens]
    generator = generator_of(labels) if draws else None
    given = logits.flatten(0, -2), runs(here.rows), labels, k, draws or 0
    ids, drawn, odds = tokens_in_runs(*given, generator=generator)
    return packed(reference_of(ids, odds + own[:, None], logits.shape[-1], draws=drawn))


def of_batches(answers: Sequence[Sequence[Numbers]], ring: int, tensor: int) -> list[Numbers]:
    """Join what the ranks of the reference gave: one array for each batch, in the order of the batches.

    Args:
        answers: by rank, one array for each forward pass. Ranks of tensor parallelism give the same; ranks of a ring
            give the parts of each batch, in order.
        ring: number of ranks in a ring.
        tensor: number of ranks of tensor parallelism.
    """
    parts = answers[::tensor]
    groups = (parts[first : first + ring] for first in range(0, len(parts), ring))
    return [np.concatenate(batch) for group in groups for batch in zip(*group, strict=True)]


def carry(spec: KLSpec, samples: Sequence[Any], found: Sequence[Numbers]) -> None:
    """Put the reference's numbers into OpenRLHF's experiences, beside the log-probs from the same forward passes.

    Args:
        spec: a spec with ``top:``.
        samples: OpenRLHF's batches of samples.
        found: what the reference actors gave for each batch, see :func:`reference_numbers`.

    Raises:
        RuntimeError: a batch has no numbers, or those of other samples.
    """
    counts = [batch.action_mask.bool().sum(-1).tolist() for batch in samples]
    if [sum(tokens) for tokens in counts] != [len(numbers) for numbers in found]:
        raise RuntimeError(
            f"kl-plugins: OpenRLHF's reference actors gave the most probable tokens for {len(found)} batches with "
            f"{sum(map(len, found))} response tokens, but the rollout has {len(samples)} batches with "
            f"{sum(map(sum, counts))}, or has them in another order, so {spec} has no reference there; this experience "
            "maker or reference actor is not known"
        )
    for batch, numbers, tokens in zip(samples, found, counts, strict=True):
        batch.info[KEY] = np.split(numbers, np.cumsum(tokens)[:-1])


def arrived(spec: KLSpec, experience: Any) -> tuple[Tensor, bool]:
    """Take the numbers out of a micro-batch. OpenRLHF would read them as a metric.

    Args:
        spec: a spec with ``top:``.
        experience: OpenRLHF's micro-batch; its ``info`` does not hold the numbers afterwards.

    Returns:
        (n, 2 k + 1) for the n response tokens, in their order, and whether each sequence has as many as tokens; zeros
        if not.

    Raises:
        RuntimeError: there are none.
    """
    numbers = experience.info.pop(KEY, None)
    if numbers is None:
        raise RuntimeError(
            f"kl-plugins: a micro-batch arrived without the reference's most probable tokens, so {spec} has no "
            "reference there; OpenRLHF's RemoteExperienceMaker collects them, and this experience maker is not known"
        )
    mask = experience.action_mask
    tokens = mask.bool().sum(-1).tolist()
    if [len(part) for part in numbers] == tokens:
        return torch.from_numpy(np.concatenate(numbers)).to(mask.device), True
    return torch.zeros(sum(tokens), numbers[0].shape[-1], device=mask.device), False
