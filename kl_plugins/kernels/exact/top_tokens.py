"""The k most probable tokens of each state, found without looking at most logits more than once.

The logits of a state are divided into groups. The k largest logits are in the k groups with the largest maxima, so all
other groups are left out. These groups are found in the same way, among the maxima, until few numbers are left.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 4
"""Number of logits in a group. They are V / 4 apart, so that one instruction computes maxima of neighbouring groups."""

ID_BITS = 29
"""Number of low bits of a float64 that are 0 if the number was a float32, or had fewer bits."""


def top_tokens(logits: Tensor, k: int) -> Tensor:
    """Return the ids (n, k) int64 of the k largest logits of each row (n, V), the largest first.

    On a CPU, 0.33 to 0.60 of the time of ``torch.topk`` were measured. If V is below k, all V ids are returned.
    """
    return largest_of(group_maxima(logits, k), k)


def group_maxima(logits: Tensor, k: int) -> list[Tensor]:
    """Return the levels of the search for k tokens: logits (n, V), the maxima of their groups (n, V / 4), and so on.

    Group g of a level has the numbers g, g + W, g + 2 W and g + 3 W of the level below; W is the number of groups. If
    the size of a level is not a multiple of four, its last numbers, at most three, belong to no group.
    """
    levels = [logits]
    while (groups := levels[-1].shape[-1] // GROUP) >= 2 * k:
        levels.append(levels[-1][:, : groups * GROUP].view(len(logits), GROUP, groups).amax(1))
    return levels


def largest_of(levels: list[Tensor], k: int) -> Tensor:
    """Return what :func:`top_tokens` returns, from the levels of :func:`group_maxima`."""
    device, top = levels[0].device, levels[-1]
    ids = _largest(top, torch.arange(top.shape[-1], device=device), min(k, top.shape[-1]), len(levels) == 1)
    for level, values in reversed(list(enumerate(levels[:-1]))):
        groups = levels[level + 1].shape[-1]
        whole, size = groups * GROUP, values.shape[-1]
        members = (ids[:, None] + torch.arange(0, whole, groups, device=device)[:, None]).flatten(1)
        if whole < size:
            rest = torch.arange(whole, size, device=device)
            members = torch.cat([members, rest.expand(len(values), -1)], -1)
        ids = _largest(values.gather(-1, members), members, k, level == 0)
    return ids


def _largest(values: Tensor, ids: Tensor, k: int, in_order: bool) -> Tensor:
    """Return the ids (n, k) of the k largest of a few values (n, m), by default the largest first.

    Args:
        values: (n, m), any float dtype.
        ids: (n, m) or (m,) int64 of the values, at least 0 and below 2**29.
        k: number of ids to return, at most m.
        in_order: sort them by their values; else their order is any.
    """
    if values.device.type != "cpu" or values.dtype == torch.float64 or torch.compiler.is_compiling():
        return _by_topk(values, ids, k)
    # NumPy selects numbers with the processor's vector instructions, but no indices. Therefore each number carries its
    # id in bits that its conversion to float64 leaves empty. This does not change the order of different numbers.
    # An infinity with such bits would be a NaN, so it becomes the largest finite float32.
    limit = torch.finfo(torch.float32).max
    keys = values.detach().double().nan_to_num_(limit, limit, -limit)
    try:
        array = keys.numpy()
    except RuntimeError:  # NumPy is not installed, or torch.vmap runs, in which tensors have no memory of their own.
        return _by_topk(values, ids, k)
    bits, others = keys.view(torch.int64), values.shape[-1] - k
    bits |= ids
    array.partition(others, axis=-1)
    if in_order:
        array[:, others:].sort(axis=-1)
    return bits[:, others:].flip(-1).bitwise_and_(2**ID_BITS - 1)


def _by_topk(values: Tensor, ids: Tensor, k: int) -> Tensor:
    """Do what :func:`_largest` does, with torch alone."""
    return ids.expand(values.shape).gather(-1, values.topk(k, -1).indices)
