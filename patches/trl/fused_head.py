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
from kl_plugins.top_k import Draws, TiledSearch

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
    """Asks for the most probable tokens of some rows, and for draws from all others.

    Attributes:
        k: number of tokens; the whole vocabulary if it has fewer.
        rows: (n,) bool; the other rows get token 0.
        draws: number m of draws; 0 for none.
        generator: source of their random numbers.
    """

    k: int
    rows: Tensor
    draws: int = 0
    generator: torch.Generator | None = None


Wanted = Tensor | MostProbable
"""The tokens to look at in n rows: their ids (n, k) int64, or those that are the most probable ones."""


class Found(NamedTuple):
    """What the head has given for n rows.

    Attributes:
        ids: (n, k) int64; with draws (n, k + m), the draws last.
        log_probs: (n, k) log-probs of these tokens with their graph, nats, float32; with draws (n, k + m).
        logp: (n,) log-probs of the labels, nats, float32.
        draws: the draws, if they were asked for.
    """

    ids: Tensor
    log_probs: Tensor
    logp: Tensor
    draws: Draws | None = None


@contextmanager
def watched(wanted: Callable[[int], Wanted], found: Callable[[Found], None]) -> Iterator[None]:
    """Within the block, TRL's fused head also gives log-probs of further tokens.

    Args:
        wanted: called with the number n of rows that the head is going to score.
        found: called with what the head has given.
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

    def __init__(self, wanted: Callable[[int], Wanted], found: Callable[[Found], None]) -> None:
        self._wanted, self._found = wanted, found

    def apply(self, hidden: Tensor, *args: Any) -> tuple[Any, ...]:
        """Call TRL's function, and look at its tiles."""
        *results, ids, log_probs, log_rate, label_log_rate = _kept_log_probs().apply(
            hidden, *args, self._wanted(len(hidden))
        )
        count = log_rate.shape[-1]
        draws = Draws(ids[:, -count:], log_rate.detach(), label_log_rate.detach()) if count else None
        self._found(Found(ids, log_probs, results[0], draws))
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
        """TRL's function, with ``wanted`` after its arguments; after its results ids, log-probs, and rates of draws."""

        @staticmethod
        def forward(ctx: Any, *given: Any) -> tuple[Any, ...]:
            """Call TRL's forward pass, and read the tiles."""
            *args, wanted = given
            ctx.transform, labels = _Transform.of(*args), args[3]
            tiles: _Read | _Search
            if isinstance(wanted, MostProbable):
                tiles = _Search(wanted, labels, args[1].shape[0], ctx.transform)
            else:
                tiles = _Read(torch.cat([wanted, labels[:, None]], -1))
            with _each_tile(FORWARD, tiles.look):
                results = trl_function.forward(ctx, *args)
            ctx.tokens, logits = tiles.tokens(), ctx.transform.of_logits(tiles.logits())
            ids = ctx.tokens[:, :-1].contiguous()
            return *results, ids, logits[:, :-1] - logits[:, -1:] + results[0][:, None], *tiles.rates()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            """Call TRL's backward pass, and add the gradient of the log-probs to the tiles."""
            *own, _, given, _, _ = grads
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
    """Reads products of given tokens out of tiles.

    Attributes:
        rows: rows of the last tile.
    """

    def __init__(self, tokens: Tensor) -> None:
        self._tokens, self._rows, self.rows = tokens, _Rows(), slice(0, 0)
        self._blocks: list[Tensor] = []

    def look(self, call: Callable[[], None], tile: Tensor, start: int) -> None:
        """Read a tile."""
        call()
        self.rows = self._rows.of(tile, start)
        tokens = self._tokens[self.rows]
        if start == 0:
            self._blocks.append(torch.zeros(tokens.shape, dtype=tile.dtype, device=tile.device))
        column, inside = _columns(tokens, start, tile)
        self._blocks[-1] = torch.where(inside, tile.gather(-1, column), self._blocks[-1])

    def tokens(self) -> Tensor:
        """Return (n, c) ids."""
        return self._tokens

    def logits(self) -> Tensor:
        """Return (n, c) products of hidden state and head."""
        return torch.cat(self._blocks) if self._blocks else torch.zeros(self._tokens.shape, device=self._tokens.device)

    def rates(self) -> tuple[Tensor, Tensor]:
        """Return log-rates (n, 0) of no draws, and (n,) those of the labels."""
        none = torch.zeros(len(self._tokens), 0, device=self._tokens.device)
        return none, none.sum(-1)


class _Search:
    """Finds the most probable tokens of some rows in tiles, draws others, and reads the products of the labels.

    Rows that are not searched get 0.
    """

    def __init__(self, wanted: MostProbable, labels: Tensor, vocabulary: int, transform: _Transform) -> None:
        self._wanted, self._labels, self._transform = wanted, labels, transform
        self._width = min(wanted.k, vocabulary) + wanted.draws
        self._own = _Read(labels[:, None])
        self._searches: list[tuple[slice, TiledSearch]] = []
        self._block: list[tuple[slice, TiledSearch]] = []

    def look(self, call: Callable[[], None], tile: Tensor, start: int) -> None:
        """Search a tile."""
        self._own.look(call, tile, start)
        rows = self._own.rows
        if start == 0:
            self._block = [(run, self._search(self._labels[rows][run])) for run in runs(self._wanted.rows[rows])]
            self._searches += [(slice(rows.start + run.start, rows.start + run.stop), it) for run, it in self._block]
        for run, search in self._block:
            search.add(tile[run], start)

    def _search(self, labels: Tensor) -> TiledSearch:
        k, _, draws, generator = self._wanted
        return TiledSearch(k, labels, draws, generator, self._transform.of_logits)

    def tokens(self) -> Tensor:
        """Return (n, k + m + 1) ids: of the most probable tokens, of the draws, and of the label."""
        found = self._labels.new_zeros(len(self._labels), self._width)
        for rows, search in self._searches:
            found[rows] = search.tokens
        return torch.cat([found, self._labels[:, None]], -1)

    def logits(self) -> Tensor:
        """Return (n, k + m + 1) products of hidden state and head."""
        own = self._own.logits()
        found = own.new_zeros(len(own), self._width)
        for rows, search in self._searches:
            found[rows] = search.logits
        return torch.cat([found, own], -1)

    def rates(self) -> tuple[Tensor, Tensor]:
        """Return log-rates (n, m) of the draws, and (n,) those of the labels."""
        found = torch.zeros(len(self._labels), self._wanted.draws, device=self._labels.device)
        own = torch.zeros(len(self._labels), device=self._labels.device)
        for rows, search in self._searches:
            _, found[rows], own[rows] = search.draws
        return found, own


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
