"""Tokens that the reference draws from its own tail, and the chance of each to be drawn.

In each state the reference draws m tokens, independently of each other and of the label, from some distribution over
the tokens outside its k most probable ones. Only two things matter for an estimate that uses them: that the probability
of each drawn token is known, and that of the label. The closer the distribution is to the reference's tail, the less
noise the estimate has.

The search for the k tokens has found the largest logit of each group of tokens, and of each group of groups. So the
draws need no further pass over the vocabulary. A large group is drawn with a probability in proportion to exp of its
largest logit, then a smaller group in it, and at last a token. Where the largest logit belongs to one of the k tokens,
the k-th largest logit takes its place. A draw that ends where all tokens are among the k has found nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from kl_plugins.kernels.exact.top_tokens import GROUP

DEEPEST = 3
"""Level of :func:`~kl_plugins.kernels.exact.top_tokens.group_maxima` whose groups are drawn first: of 4**3 tokens."""

NOTHING = 1e4
"""Log-rate of a draw that found no token, nats: a token that is drawn so often has no weight. Minus this number is the
log-rate of a label that cannot be drawn."""


class Draws(NamedTuple):
    """The draws of each row.

    Attributes:
        ids: (n, m) int64 tokens, 0 where nothing was found.
        log_rate: (n, m) log of m times the token's probability to be drawn; 1e4 where nothing was found.
        label_log_rate: (n,) the same for the label; -1e4 if it cannot be drawn.
    """

    ids: Tensor
    log_rate: Tensor
    label_log_rate: Tensor


class TailDraws(NamedTuple):
    """Draws of each row before their rates are known, for rows of which only a part of the vocabulary has been seen.

    A token of weight w is drawn with probability w / W, where W is the sum of the weights of everything that can be
    drawn. So draws from several parts of the vocabulary can be joined: their weights stay, and their W are added up.

    Attributes:
        ids: (n, m) int64 tokens; any token where nothing was found.
        found: (n, m) bool.
        log_weight: (n, m) float64 log of the token's weight; any finite number where nothing was found.
        label_log_weight: (n,) float64, -inf if the label cannot be drawn.
        log_total: (n,) float64 log of W; -inf if nothing can be drawn.
    """

    ids: Tensor
    found: Tensor
    log_weight: Tensor
    label_log_weight: Tensor
    log_total: Tensor

    def draws(self, dtype: torch.dtype = torch.float32) -> Draws:
        """Return the draws with their rates, which have the given dtype."""
        found, total, log_count = self.found, self.log_total, math.log(max(1, self.ids.shape[-1]))
        log_rate = (self.log_weight - total[:, None]).clamp(-NOTHING, 0.0) + log_count
        own = (self.label_log_weight - total).nan_to_num(-torch.inf)
        own_log_rate = own.clamp_max(0.0) + log_count
        return Draws(
            self.ids.masked_fill(~found, 0),
            log_rate.masked_fill(~found, NOTHING).to(dtype),
            own_log_rate.masked_fill(own < -NOTHING, -NOTHING).to(dtype),
        )


class Runs:
    """Several tensors (n_i, V) that stand for one (n, V) of all their rows, which would be a copy.

    Attributes:
        shape, dtype, device: those of the tensor that they stand for.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        """Note where the rows are.

        Args:
            parts: at least one tensor, all with the same V.
        """
        ends = [0, *accumulate(len(part) for part in parts)]
        self._parts = [(part, slice(*rows)) for part, rows in zip(parts, pairwise(ends), strict=True)]
        self.shape = torch.Size([ends[-1], parts[0].shape[-1]])
        self.dtype, self.device = parts[0].dtype, parts[0].device

    def gather(self, dim: int, ids: Tensor) -> Tensor:
        """Do what ``torch.gather`` does."""
        found = torch.empty(ids.shape, dtype=self.dtype, device=self.device)
        for part, rows in self._parts:
            torch.gather(part, dim, ids[rows], out=found[rows])
        return found

    def joined(self) -> Tensor:
        """Return the tensor that they stand for."""
        return torch.cat([part for part, _ in self._parts])


Level = Tensor | Runs
"""A level of the search for the k tokens."""


def tail_draws(
    levels: Sequence[Level],
    top: Tensor,
    labels: Tensor,
    count: int,
    generator: torch.Generator | None,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> TailDraws:
    """Draw tokens outside the k most probable ones of each row.

    Args:
        levels: of the reference's logits (n, V), see :func:`~kl_plugins.kernels.exact.top_tokens.group_maxima`.
        top: (n, k) int64, the k most probable tokens, the last one the least probable.
        labels: (n,) int64 tokens; -1 for a label that is not among the V tokens.
        count: number of draws m.
        generator: source of the random numbers, on the device of the logits; None for torch's own.
        transform: makes final logits, in nats, of those in ``levels``, and keeps their order; by default none is made.
    """
    levels = levels[: DEEPEST + 1]
    logits, last, depth = levels[0], levels[-1], len(levels) - 1
    last = last.joined() if isinstance(last, Runs) else last
    dtype = torch.promote_types(logits.dtype, torch.float32)
    limit = logits.gather(-1, top[:, -1:])

    def final(values: Tensor) -> Tensor:
        return values.to(dtype) if transform is None else transform(values.to(dtype))

    bound = final(limit)

    def weights(values: Tensor, level: int) -> Tensor:
        """Return exp(logit - bound), at most 1, and 0 for the k tokens and for those that have no chance."""
        below = (final(values) - bound).clamp_max(0.0).exp().nan_to_num(0.0)
        return below if level else below.masked_fill(values >= limit, 0.0)

    first = weights(last, depth)
    own, covered = _places(labels, levels)
    places = torch.cat([own[-1][:, None], choices(first, count, generator)], -1)
    rate = first.gather(-1, places)
    for level in reversed(range(depth)):
        groups = levels[level + 1].shape[-1]
        members = places[..., None] + torch.arange(0, GROUP * groups, groups, device=logits.device)
        found = weights(levels[level].gather(-1, members.flatten(1)), level).view(members.shape)
        chosen = torch.cat([own[level][:, None] // groups, choices(found[:, 1:], count, generator)], -1)
        chosen = chosen[..., None].clamp_max(GROUP - 1)
        places = members.gather(-1, chosen)[..., 0]
        rate = rate * found.gather(-1, chosen)[..., 0] / found.sum(-1)
    rate = rate.double().nan_to_num(0.0)  # nothing is left of a group whose tokens all are 0
    hit, unit = rate[:, 1:] > 0, bound.double().nan_to_num(0.0)
    return TailDraws(
        places[:, 1:],
        hit,
        torch.where(hit, rate[:, 1:].log() + unit, 0.0),
        (rate[:, 0].log() + unit[:, 0]).masked_fill(~covered, -torch.inf),
        first.sum(-1).double().log() + unit[:, 0],
    )


def choices(chances: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Choose among chances (n, g) of all m draws of a row, or (n, m, g) of each, and return indices (n, m) int64."""
    edges = chances.double().cumsum(-1)
    random = torch.rand(len(chances), count, generator=generator, device=chances.device, dtype=torch.float64)
    if chances.dim() == 2:
        return torch.searchsorted(edges, random * edges[:, -1:], right=True).clamp_max(chances.shape[-1] - 1)
    return (edges <= (random * edges[..., -1])[..., None]).sum(-1).clamp_max(chances.shape[-1] - 1)


def _places(tokens: Tensor, levels: Sequence[Level]) -> tuple[list[Tensor], Tensor]:
    """Return the place (n,) of each token (n,) on each level, and (n,) whether it has one on all of them."""
    places, covered = [tokens.clamp_min(0)], tokens >= 0
    for level in levels[1:]:
        groups = level.shape[-1]
        covered &= places[-1] < GROUP * groups
        places.append(places[-1] % groups)
    return places, covered
