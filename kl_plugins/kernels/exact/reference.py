"""The part of a reference's distribution that a KL over a set of tokens and one bucket needs: see :mod:`bucket`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kl_plugins.kernels.exact.eager import TILE_BYTES, tiles
from kl_plugins.kernels.exact.statistics import Options, scaled
from kl_plugins.kernels.exact.tail_draws import tail_draws
from kl_plugins.kernels.exact.top_tokens import group_maxima, largest_of

ACCELERATOR_TILE_BYTES = 2**30
"""Default bound on the temporaries of a call on an accelerator, in bytes. Small tiles would leave it partly idle."""


class RefDraws(NamedTuple):
    """Tokens that the reference drew from its tail in each state: 3 m + 1 numbers per state.

    Attributes:
        ids: (..., m) integers; any token where nothing was drawn.
        logp: (..., m) log-probs of these tokens under the reference, nats, float32.
        log_rate: (..., m) log of m times the token's probability to be drawn, nats; 1e4 where nothing was drawn.
        label_log_rate: (...) the same for the label, nats; -1e4 if it cannot be drawn.
    """

    ids: Tensor
    logp: Tensor
    log_rate: Tensor
    label_log_rate: Tensor

    def rows(self) -> RefDraws:
        """Return the draws by row: (N, m) three times, and (N,), detached."""
        ids, logp, log_rate, label_log_rate = (part.detach() for part in self)
        rows = [part.reshape(-1, ids.shape[-1]) for part in (ids.long(), logp, log_rate)]
        return RefDraws(rows[0], rows[1], rows[2], label_log_rate.reshape(-1))


class RefTopK(NamedTuple):
    """The part of a reference's distribution that is kept: 2 k + 1 numbers per state, and those of the draws.

    Attributes:
        ids: (..., k) integers, the reference's most probable tokens, each once.
        logp: (..., k) log-probs of these tokens under the reference, nats, float32.
        log_tail: (...) log of the probability of all other tokens, nats, float32; -inf if there are no other tokens.
        temperature: the number by which the reference's logits were divided. The policy's temperature must be the same.
        draws: tokens that were drawn from all others, or None.
    """

    ids: Tensor
    logp: Tensor
    log_tail: Tensor
    temperature: float = 1.0
    draws: RefDraws | None = None

    @property
    def tokens(self) -> Tensor:
        """(..., k + m) ids of the most probable tokens and of the draws, whose log-probs ``top_k_kl`` needs."""
        return self.ids if self.draws is None else torch.cat([self.ids, self.draws.ids.to(self.ids)], -1)


def tail_tiles(logits: Tensor, options: Options) -> Iterator[slice]:
    """Yield slices of rows for :func:`tail_log_sum_exp`, sized by the options' bound or the device's default."""
    default = TILE_BYTES if logits.device.type == "cpu" else ACCELERATOR_TILE_BYTES
    return tiles(logits, options.tile_bytes or default, torch.promote_types(logits.dtype, torch.float32))


def tail_log_sum_exp(logits: Tensor, ids: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Compute the log-sum-exp of the scaled logits of all tokens except the given ones, for a few rows.

    Args:
        logits: (n, V), any float dtype.
        ids: (n, k) int64, the tokens to leave out.
        scale: 1 / temperature.
        softcap: soft-cap of the model's final logits, or None.

    Returns:
        (n,) float64; -inf where no token is left. The sum is taken around the tail's own maximum and is never a
        difference of sums, so a tail of 1e-30 keeps its digits.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rest = scaled(logits.to(dtype, copy=True), scale, softcap).scatter_(-1, ids, -torch.inf)
    largest = rest.amax(-1, keepdim=True)
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    mass = rest.sub_(largest).exp_().sum(-1)
    return largest[:, 0].double() + mass.double().log()


class Drawing(NamedTuple):
    """How the reference draws.

    Attributes:
        labels: (N,) int64 tokens, at least 0.
        draws: number of draws per row, at least 1.
        generator: source of the random numbers; None for torch's own.
    """

    labels: Tensor
    draws: int
    generator: torch.Generator | None = None


def reference_rows(logits: Tensor, k: int, options: Options, drawing: Drawing | None = None) -> RefTopK:
    """Return the k most probable tokens of each row of the reference's logits (N, V), computed tile by tile.

    The log of the tail is a log-sum-exp of its own, so a tail of any size keeps its digits.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    count = 0 if drawing is None else drawing.draws
    parts: list[tuple[Tensor, ...]] = []

    def final(values: Tensor) -> Tensor:
        return scaled(values, options.scale, options.softcap)

    with torch.no_grad():
        for rows in tail_tiles(logits, options):
            levels = group_maxima(logits[rows], k)
            ids = largest_of(levels, k)
            z = final(logits[rows].gather(-1, ids).double())
            tail = tail_log_sum_exp(logits[rows], ids, options.scale, options.softcap)
            lse = torch.logaddexp(z.logsumexp(-1), tail)
            parts.append((ids, (z - lse[:, None]).to(dtype), (tail - lse).to(dtype)))
            if drawing is not None:
                found = tail_draws(levels, ids, drawing.labels[rows], count, drawing.generator, final)
                drawn, log_rate, label_log_rate = found.draws(dtype)
                z = final(logits[rows].gather(-1, drawn).double())
                parts[-1] += (drawn, (z - lse[:, None]).to(dtype), log_rate, label_log_rate)
        if not parts:
            empty = logits.new_zeros(0, min(k, logits.shape[-1]), dtype=dtype)
            none = logits.new_zeros(0, count, dtype=dtype)
            parts.append((empty.long(), empty, empty.sum(-1), none.long(), none, none, none.sum(-1)))
        ids, logp, log_tail, *draws = (torch.cat(part) for part in zip(*parts, strict=True))
    given = None if drawing is None else RefDraws(draws[0], draws[1], draws[2], draws[3])
    return RefTopK(ids, logp, log_tail, 1.0 / options.scale, given)
