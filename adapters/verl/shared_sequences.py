"""Which tokens of a packed micro-batch this process holds, where several ranks share its sequences (Ulysses).

veRL pads the packed tokens to a multiple of the number of ranks and gives each rank a part of them, one after the
other. Log-probs are gathered before veRL's loss function sees them; logits are not.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shared() -> bool:
    """Whether this process shares its sequences with others."""
    from verl.utils import ulysses

    return int(ulysses.get_ulysses_sequence_parallel_world_size()) > 1


def own_range(tokens: int) -> tuple[int, int]:
    """Return the first packed position of this process, and the end; padding is counted.

    Args:
        tokens: number of packed tokens of the micro-batch, without padding.
    """
    from verl.utils import ulysses

    size = -(-tokens // ulysses.get_ulysses_sequence_parallel_world_size())
    start = size * ulysses.get_ulysses_sequence_parallel_rank()
    return start, start + size


def held_here(values: Tensor, fill: float) -> Tensor:
    """Return the part of packed values that belongs to this process; all of them if it shares no sequences.

    Args:
        values: (N, ...) one entry per packed token.
        fill: entry of the padding.

    Returns:
        (M, ...) with M = N divided by the number of ranks, rounded up.
    """
    start, stop = own_range(len(values))
    held = values[start:stop]
    missing = stop - start - len(held)
    return held if missing == 0 else torch.cat([held, held.new_full((missing, *held.shape[1:]), fill)])


def of_all(held: Tensor, tokens: int) -> Tensor:
    """Undo :func:`held_here`, without a gradient: a collective of the ranks that share the sequences.

    Args:
        held: (M, ...) entries of this process.
        tokens: number N of packed tokens, without padding.

    Returns:
        (N, ...).
    """
    from verl.utils import ulysses

    everything: Tensor = ulysses.gather_outputs_and_unpad(held.detach(), gather_dim=0)
    return everything[:tokens]
