"""``top:`` inside TRL's fused output head: log-probs of further tokens, from the products that TRL computes anyway.

Newer versions of TRL never make all logits. Their fused head multiplies hidden states by a tile of the head's rows,
takes what the log-probs need out of the tile, and drops it. In the backward pass it makes each tile again and turns it
into the gradient of the logits. A second head of our own would cost five more products of that size per token. So this
module looks at TRL's tiles while they exist: it reads the logits of the reference's most probable tokens, and in the
backward pass it adds their gradient. TRL's own results do not change.

All of this depends on how TRL's function is written. It is used only where that function has a known fingerprint;
elsewhere the head is multiplied once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kl_plugins.adapters.top_k import runs
from kl_plugins.patches.engine.fingerprint import fingerprint
from kl_plugins.top_k import top_tokens

KNOWN = {"forward": ("62eaae0737516d55",), "backward": ("cc64f79b264f452b",)}
"""Fingerprints of the methods of TRL's ``ChunkedLogProbFunction`` that this module was written for: TRL 1.16."""

FORWARD, BACKWARD = ("_forward_tile", "_forward_kernel"), ("_backward_tile", "_backward_kernel")
"""Names under which TRL's module has what it calls for each tile, in torch and in Triton."""

FIRST_TOKEN = {FORWARD: 10, BACKWARD: 7}
"""Position of the argument with the first token of a tile's columns."""


def is_known() -> bool:
    """Whether TRL has a fused head that this module was written for."""
    head = _trl_function()
    return head is not None and all(fingerprint(getattr(head, name)) in digests for name, digests in KNOWN.items())


class MostProbable(NamedTuple):
    """Asks for the most probable tokens of some rows.

    Attributes:
        k: number of tokens; the whole vocabulary if it has fewer.
        rows: (n,) bool; the other rows get token 0.
    """

    k: int
    rows: Tensor


Wanted = Tensor | MostProbable
"""The tokens to look at in n rows: their ids (n, k) int64, or those that are the most probable ones."""


@contextmanager
def watched(wanted: Callable[[int], Wanted], found: Callable[[Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """Within the block, TRL's fused head also gives log-probs of further tokens.

    Args:
        wanted: called with the number n of rows that the head is going to score.
        found: called with the ids (n, k), their log-probs (n, k) with their graph, and the log-probs (n,) of the
            labels; nats, float32.
    """
    from trl.trainer import utils

    own = utils._ChunkedLogProbFunction
    utils._ChunkedLogProbFunction = _Watched(wanted, found)
    try:
        yield
    finally:
        utils._ChunkedLogProbFunction = own


class _Watched:
    """Stands in for TRL's function within :func:`watched`, and has the same arguments."""

    def __init__(self, wanted: Callable[[int], Wanted], found: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        self._wanted, self._found = wanted, found

    def apply(self, hidden: Tensor, *args: Any) -> tuple[Any, ...]:
        """Call TRL's function, and look at its tiles."""
        *results, ids, log_probs = _kept_log_probs().apply(hidden, *args, self._wanted(len(hidden)))
        self._found(ids, log_probs, results[0])
        return tuple(results)


def _trl_function() -> Any:
    try:
        from trl.kernels import ChunkedLogProbFunction
    except ImportError:
        return None
    return ChunkedLogProbFunction


@cache
def _kept_log_probs() -> Any:
    """Make the subclass of TRL's function; TRL is imported only here."""
    trl_function: Any = _trl_function()

    class KeptLogProbs(trl_function):  # type: ignore[misc]
        """TRL's function, with ``wanted`` after its arguments, and ids and log-probs after its results."""

        @staticmethod
        def forward(ctx: Any, *given: Any) -> tuple[Any, ...]:
            """Call TRL's forward pass, and read the tiles."""
            *args, wanted = given
            tiles = _Read(wanted, labels=args[3])
            with _each_tile(FORWARD, tiles.look):
                results = trl_function.forward(ctx, *args)
            ctx.tokens, ctx.transform = tiles.tokens(), _Transform.of(*args)
            logits = ctx.transform.of_logits(tiles.logits())
            ids = ctx.tokens[:, :-1].contiguous()
            return *results, ids, logits[:, :-1] - logits[:, -1:] + results[0][:, None]

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            """Call TRL's backward pass, and add the gradient of the log-probs to the tiles."""
            *own, _, given = grads
            if given is None:
                return *trl_function.backward(ctx, *own), None
            # log p_a = z_a - z_label + log p_label, and TRL's own gradient does the last part.
            label = given.sum(-1)
            own[0] = label if own[0] is None else own[0] + label
            tiles = _Add(ctx.tokens, torch.cat([given, -label[:, None]], -1), ctx.transform)
            with _each_tile(BACKWARD, tiles.look):
                return *trl_function.backward(ctx, *own), None

    return KeptLogProbs


class _Transform(NamedTuple):
    """What TRL does to the products of hidden states and head."""

    scale: float
    softcap: float | None
    temperature: float

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        scale: float = 1.0,
        outputs: Any = None,
    ) -> _Transform:
        """Read the arguments of TRL's function."""
        return cls(scale, softcap, temperature)

    def of_logits(self, products: Tensor) -> Tensor:
        """Return the logits, float32."""
        logits = products.float() * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits / self.temperature

    def slopes(self, tile: Tensor, column: Tensor) -> Tensor | float:
        """Return the derivatives of the logits in some columns of a tile with respect to the products, float32."""
        slope = self.scale / self.temperature
        if self.softcap is None:
            return slope
        return slope * (1 - torch.tanh(tile.gather(-1, column).float() * self.scale / self.softcap).square())


class _Rows:
    """Knows which rows a tile has: TRL takes the rows in blocks, and goes through all columns of each block."""

    def __init__(self) -> None:
        self._stop, self._rows = 0, slice(0, 0)

    def of(self, tile: Tensor, start: int) -> slice:
        """Return the rows of the next tile."""
        if start == 0:
            self._rows = slice(self._stop, self._stop + len(tile))
            self._stop += len(tile)
        return self._rows


class _Read:
    """Reads products out of tiles: those of given tokens or of the most probable ones, and then those of the labels."""

    def __init__(self, wanted: Wanted, labels: Tensor) -> None:
        self._labels, self._rows = labels, _Rows()
        self._sought = wanted if isinstance(wanted, MostProbable) else None
        self._given = None if isinstance(wanted, MostProbable) else torch.cat([wanted, labels[:, None]], -1)
        self._blocks: list[tuple[Tensor, Tensor]] = []
        self._runs: list[slice] = []

    def look(self, call: Callable[[], None], tile: Tensor, start: int) -> None:
        """Read a tile."""
        call()
        rows = self._rows.of(tile, start)
        tokens = self._labels[rows, None] if self._given is None else self._given[rows]
        if start == 0:
            self._blocks.append((tokens, torch.zeros(tokens.shape, dtype=tile.dtype, device=tile.device)))
            self._runs = [] if self._sought is None else runs(self._sought.rows[rows])
        known, products = self._blocks[-1]
        column, inside = _columns(tokens, start, tile)
        last = tokens.shape[-1]  # the tokens that were found stand before the label
        read = torch.where(inside, tile.gather(-1, column), products[:, -last:])
        if self._sought is not None:
            known, read = self._with_best(self._sought.k, known, torch.cat([products[:, :-1], read], -1), tile, start)
        self._blocks[-1] = known, read

    def _with_best(self, k: int, known: Tensor, products: Tensor, tile: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Replace the most probable tokens and their products by those of the tile where these are larger."""
        before, width = known.shape[1] - 1, min(k, tile.shape[1])
        count = min(k, before + width)
        ids, best = known.new_zeros(len(known), count + 1), products.new_zeros(len(known), count + 1)
        ids[:, -1], best[:, -1] = known[:, -1], products[:, -1]
        for run in self._runs:
            top = top_tokens(tile[run], k)
            here = tile[run].gather(-1, top)
            if before:
                here = torch.cat([products[run, :-1], here], -1)
                here, index = here.topk(count, -1)
                top = torch.cat([known[run, :-1] - start, top], -1).gather(-1, index)
            ids[run, :-1], best[run, :-1] = top + start, here
        return ids, best

    def tokens(self) -> Tensor:
        """Return (n, k + 1) ids, that of the label last."""
        return torch.cat([block[0] for block in self._blocks])

    def logits(self) -> Tensor:
        """Return (n, k + 1) products of hidden state and head."""
        return torch.cat([block[1] for block in self._blocks])


class _Add:
    """Adds the gradient with respect to some logits to tiles that hold the gradient of the products."""

    def __init__(self, tokens: Tensor, gradient: Tensor, transform: _Transform) -> None:
        self._tokens, self._gradient, self._transform, self._rows = tokens, gradient, transform, _Rows()

    def look(self, call: Callable[[], None], tile: Tensor, start: int) -> None:
        """Let TRL turn a tile into its gradient, and add ours."""
        rows = self._rows.of(tile, start)
        column, inside = _columns(self._tokens[rows], start, tile)
        slopes = self._transform.slopes(tile, column)
        call()
        ours = torch.where(inside, self._gradient[rows] * slopes, 0.0)
        tile.scatter_add_(-1, column, ours.to(tile.dtype))


def _columns(tokens: Tensor, start: int, tile: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns of some tokens in a tile, 0 where they are outside, and whether they are inside."""
    column = tokens - start
    inside = (column >= 0) & (column < tile.shape[1])
    return column.masked_fill(~inside, 0), inside


Look = Callable[[Callable[[], None], Tensor, int], None]
"""Called for each tile: with what calls TRL's function of the tile, the tile, and the first token of its columns."""


# Both stand-ins are classes of this module. A class that a function makes is part of a reference cycle, so everything
# that it refers to, here tensors of a micro-batch, would stay in memory until Python's garbage collector runs.
class _Looked:
    """Stands in for a function of a tile, or for a Triton kernel, which is called as ``kernel[grid](...)``."""

    def __init__(self, function: Any, look: Look, first_token: int) -> None:
        self._function, self._look, self._first_token = function, look, first_token

    def __getitem__(self, grid: Any) -> _Looked:
        return _Looked(self._function[grid], self._look, self._first_token)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self._look(lambda: self._function(*args, **kwargs), args[0], args[self._first_token])


@contextmanager
def _each_tile(names: tuple[str, str], look: Look) -> Iterator[None]:
    """Within the block, TRL's functions of a tile are called through ``look``."""
    from trl.kernels import chunked_logprob

    own = {name: getattr(chunked_logprob, name) for name in names if hasattr(chunked_logprob, name)}
    for name, function in own.items():
        setattr(chunked_logprob, name, _Looked(function, look, FIRST_TOKEN[names]))
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(chunked_logprob, name, function)
