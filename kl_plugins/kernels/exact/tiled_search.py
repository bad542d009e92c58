"""The k most probable tokens of some rows, and draws from all others, where the logits come in parts.

A fused output head never holds all logits of a row. It makes a tile of them, takes what it needs, and drops it. The
search here looks at one tile after the other and keeps the k best tokens so far. So the tokens that are not among the
k best at the end were left out in one of two ways: in their own tile, or later, when better ones came. Both kinds can
be drawn: the first from the tile, by :func:`~kl_plugins.kernels.exact.tail_draws.tail_draws`, the second when they
leave the k best, with a weight of exp(logit). Each new part takes the place of an earlier draw with the probability
that its share of the weights gives it. So each draw ends as if it had been made among all parts at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kl_plugins.kernels.exact.tail_draws import Draws, TailDraws, choices, tail_draws
from kl_plugins.kernels.exact.top_tokens import group_maxima, largest_of


class TiledSearch:
    """A search in the logits of n rows, tile by tile."""

    def __init__(
        self,
        k: int,
        labels: Tensor,
        draws: int = 0,
        generator: torch.Generator | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Start without a tile.

        Args:
            k: number of tokens; the whole vocabulary if it has fewer.
            labels: (n,) int64 tokens. Only draws need them.
            draws: number m of tokens to draw in each row; 0 for none.
            generator: source of their random numbers; None for torch's own.
            transform: makes final logits, in nats, of those in the tiles, and keeps their order; by default none is
                made.
        """
        self._k, self._labels, self._count, self._generator = k, labels, draws, generator
        self._transform = transform
        self._ids, self._logits = labels.new_zeros(len(labels), 0), torch.zeros(len(labels), 0, device=labels.device)
        nothing = torch.zeros(len(labels), draws, dtype=torch.float64, device=labels.device)
        never = torch.full_like(labels, -torch.inf, dtype=torch.float64)
        self._drawn = TailDraws(nothing.long(), nothing.bool(), nothing, never, never)
        self._drawn_logits = nothing

    @property
    def tokens(self) -> Tensor:
        """(n, k + m) int64, the most probable tokens so far, the largest first, and the draws after them."""
        return torch.cat([self._ids, self._drawn.ids], -1)

    @property
    def logits(self) -> Tensor:
        """(n, k + m) logits of :attr:`tokens` as they stand in the tiles."""
        return torch.cat([self._logits, self._drawn_logits.to(self._logits)], -1)

    @property
    def draws(self) -> Draws:
        """The draws so far; with m = 0 no token can be drawn."""
        return self._drawn.draws()

    def add(self, tile: Tensor, start: int) -> None:
        """Search the next tile.

        Args:
            tile: (n, W) logits of the tokens from ``start`` on, any float dtype.
            start: first token of the tile.
        """
        levels = group_maxima(tile, self._k)
        top = largest_of(levels, self._k)
        ids, logits = top + start, tile.gather(-1, top)
        if self._count:
            labels = self._labels - start
            labels = labels.masked_fill(labels >= tile.shape[-1], -1)
            found = tail_draws(levels, top, labels, self._count, self._generator, self._transform)
            self._join(found._replace(ids=found.ids + start), tile.gather(-1, found.ids))
        if self._ids.shape[-1]:
            logits, order = torch.cat([self._logits, logits], -1).sort(-1, descending=True)
            ids = torch.cat([self._ids, ids], -1).gather(-1, order)
            if self._count and ids.shape[-1] > self._k:
                self._join(*self._of_dropped(ids[:, self._k :], logits[:, self._k :]))
        self._ids, self._logits = ids[:, : self._k], logits[:, : self._k]

    def _of_dropped(self, ids: Tensor, logits: Tensor) -> tuple[TailDraws, Tensor]:
        """Draw among tokens (n, d) that have left the k best, each with the weight exp(logit)."""
        values = logits.to(torch.promote_types(logits.dtype, torch.float32))
        values = (values if self._transform is None else self._transform(values)).double()
        unit = values.amax(-1, keepdim=True).nan_to_num(0.0)
        weights = (values - unit).exp().nan_to_num(0.0)
        index = choices(weights, self._count, self._generator)
        own = weights.masked_fill(ids != self._labels[:, None], 0.0).amax(-1)
        drawn = TailDraws(
            ids.gather(-1, index),
            torch.ones_like(index, dtype=torch.bool),
            values.gather(-1, index),
            own.log() + unit[:, 0],
            weights.sum(-1).log() + unit[:, 0],  # where this is -inf, no draw is taken
        )
        return drawn, logits.gather(-1, index)

    def _join(self, new: TailDraws, logits: Tensor) -> None:
        """Let new draws take the place of those so far, each with the probability that the weights give it."""
        old = self._drawn
        total = torch.logaddexp(old.log_total, new.log_total)
        share = (new.log_total - total).exp().nan_to_num(0.0)[:, None]
        taken = choices(torch.cat([1 - share, share], -1), self._count, self._generator) > 0
        self._drawn = TailDraws(
            torch.where(taken, new.ids, old.ids),
            torch.where(taken, new.found, old.found),
            torch.where(taken, new.log_weight, old.log_weight),
            torch.maximum(old.label_log_weight, new.label_log_weight),
            total,
        )
        self._drawn_logits = torch.where(taken, logits.to(self._drawn_logits), self._drawn_logits)
