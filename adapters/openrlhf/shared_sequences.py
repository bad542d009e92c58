"""Policy workers that share their sequences: under tensor parallelism and under ring attention.

All ranks of such a group train on the same micro-batch, and OpenRLHF gives each of them the log-probs of all its
tokens. Under ring attention each rank has the logits of its own part of the packed tokens; under tensor parallelism
each has all logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

DATA_PARALLEL = "dp"
"""Name that OpenRLHF gives to the only dimension of its mesh along which ranks have different sequences."""


def is_counted(mesh: Any) -> bool:
    """Whether the tokens of this process belong into sums over all ranks: those of one rank of each group do.

    Args:
        mesh: OpenRLHF's device mesh; its dimensions are ``dp``, ``sp`` (ring attention) and ``tp``.
    """
    position = zip(mesh.mesh_dim_names, mesh.get_coordinate(), strict=True)
    return all(index == 0 for name, index in position if name != DATA_PARALLEL)


class Held(NamedTuple):
    """The states of a micro-batch whose logits this process has, and the response tokens that were drawn in them.

    Attributes:
        rows: (M,) bool, rows of the logits here that are states of response tokens.
        tokens: which of the micro-batch's response tokens these are; they follow each other.
        everywhere: (N,) bool, the same rows among the packed tokens of all ranks.
        group: process group of the ranks that hold parts; None if this process holds all.
    """

    rows: Tensor
    tokens: slice
    everywhere: Tensor
    group: Any = None

    def of_all(self, values: Tensor) -> Tensor:
        """Join the values of all ranks that hold parts: a collective, through which gradients flow back.

        Args:
            values: one for each response token that belongs to the rows here.

        Returns:
            One for each response token of the micro-batch.
        """
        if self.group is None:
            return values
        from openrlhf.models import ring_attn_utils

        part = torch.zeros(self.rows.shape, dtype=values.dtype, device=values.device)
        whole: Tensor = ring_attn_utils.all_gather(part.masked_scatter(self.rows, values), self.group)
        return whole[: len(self.everywhere)][self.everywhere]


def held(mask: Tensor, attention_mask: Tensor, shape: torch.Size) -> Held:
    """Find the rows of OpenRLHF's logits that are the states in which the response tokens were drawn.

    Args:
        mask: (B, A) bool, response tokens among the last A tokens of each sequence.
        attention_mask: (B, L) tokens that are no padding.
        shape: of the logits without the vocabulary: (B, L), or (1, M) where OpenRLHF packs the sequences. Under ring
            attention, M is the number of packed tokens divided by the number of ranks, rounded up.
    """
    padded = torch.zeros(attention_mask.shape, dtype=torch.bool, device=mask.device)
    padded[:, -mask.shape[1] - 1 : -1] = mask
    everywhere = (padded if shape == padded.shape else padded[attention_mask.bool()]).flatten()
    if len(everywhere) == shape.numel():
        return Held(everywhere, slice(None), everywhere)
    from openrlhf.models import ring_attn_utils

    group = ring_attn_utils.get_ring_attn_group()
    start = torch.distributed.get_rank(group) * shape.numel()
    rows = everywhere[start : start + shape.numel()]
    first = int(everywhere[:start].sum())
    tokens = slice(first, first + int(rows.sum()))
    padding = rows.new_zeros(shape.numel() - len(rows))  # of the last rank
    return Held(torch.cat([rows, padding]), tokens, everywhere, group)
