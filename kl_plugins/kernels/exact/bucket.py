"""The KL over a fixed set of tokens and one bucket for all others, from the reference's most probable tokens alone.

S is a set of k tokens per state that does not depend on the drawn token. p and r are the probabilities of policy and
reference, and P and R are the probabilities that they give to all tokens outside S. With u_a = log(p_a / r_a) and
L = log(P / R),

    KL = sum_S p u + P L + E_{a ~ p}[1{a not in S} (u_a - L)].

The sum and the bucket term P L together are the KL of k + 1 cells. It is exact, at least 0, a lower bound of the KL,
and differentiable. The last term is the KL inside the bucket. Its gradient is estimated with one sampled coefficient:
u_a - L, on the log-prob of the drawn token. So the estimate is unbiased for any S, and only the tail adds noise.

The value is computed as sum p k3(u) over the cells, with k3(u) = exp(-u) - 1 + u. Both are equal, because
sum p exp(-u) = 1. In this form, an error that all u have in common, such as a rounded log-sum-exp, has only a
second-order effect.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kl_plugins.kernels.exact.autograd import BackwardPass, flattened, for_each_argument, named
from kl_plugins.kernels.exact.backends import backend_for
from kl_plugins.kernels.exact.logits import check_labels
from kl_plugins.kernels.exact.reference import tail_log_sum_exp, tail_tiles
from kl_plugins.kernels.exact.statistics import IGNORE_INDEX, Options, Rows, RowStatistics, Upstream, scaled
from kl_plugins.numerics import LINEAR_LIMIT


class TopKReference(NamedTuple):
    """The reference of each row: three fields of :class:`RefTopK`, (N, k), (N, k) and (N,), and the label's log-prob.

    ``label_logp`` is (N,), nats. It is read only where the label is not one of the k tokens.
    """

    ids: Tensor
    logp: Tensor
    log_tail: Tensor
    label_logp: Tensor

    def at(self, index: Tensor | slice) -> TopKReference:
        """Return the reference of the selected rows."""
        return TopKReference(*(part[index] for part in self))


class TopKRows(NamedTuple):
    """Logits of the policy, (N, V), labels, (N,) int64, and then the fields of :class:`TopKReference`."""

    logits: Tensor
    labels: Tensor
    ids: Tensor
    logp: Tensor
    log_tail: Tensor
    label_logp: Tensor

    def at(self, index: Tensor | slice) -> TopKRows:
        """Return the selected rows."""
        return TopKRows(*(part[index] for part in self))


class TopKStatistics(NamedTuple):
    """Statistics per row, all (N,), float32 (float64 for float64 logits), 0 in ignored rows.

    Attributes:
        kl: KL of the k + 1 cells, nats, in [0, 1e4].
        logp: log-prob of the label under the policy, nats, at least -1e4.
        remainder: u - L of a label outside S, nats, within 1e4; 0 for a label in S.
        lse: log-sum-exp of the policy's scaled logits.
        mean: mean log-ratio of the cells, sum p u + P L, nats.
        level: L, nats, within 1e4; 0 where the policy's bucket is empty.
    """

    kl: Tensor
    logp: Tensor
    remainder: Tensor
    lse: Tensor
    mean: Tensor
    level: Tensor

    def at(self, index: Tensor | slice) -> TopKStatistics:
        """Return the statistics of the selected rows."""
        return TopKStatistics(*(part[index] for part in self))


def top_k_statistics(rows: TopKRows, options: Options) -> TopKStatistics:
    """Compute the statistics of each row, with one pass over the logits, tile by tile.

    2 k + 1 numbers of each row are computed in float64.
    """
    _check_ids(rows.ids, rows.logits.shape[-1])
    backend_for(rows.logits, options)  # The gradient needs this backend: raise now if it cannot be used.
    dtype = torch.promote_types(rows.logits.dtype, torch.float32)
    parts = [_tile_statistics(rows.at(part), options, dtype) for part in tail_tiles(rows.logits, options)]
    if not parts:
        return TopKStatistics(*(rows.logits.new_zeros(0, dtype=dtype) for _ in TopKStatistics._fields))
    return TopKStatistics(*(torch.cat(part) for part in zip(*parts, strict=True)))


def top_k_gradients(
    rows: TopKRows, statistics: TopKStatistics, upstream: Upstream, options: Options, out: Tensor | None = None
) -> Tensor:
    """Compute the gradient with respect to the policy's logits.

    The gradient of the KL is p_j (u_j - mean) in S and p_j (L - mean) outside, both times ``upstream.kl``. The gradient
    of the label's log-prob, times ``upstream.logp``, is added.

    Args:
        rows, options: the arguments of :func:`top_k_statistics`.
        statistics: the result of :func:`top_k_statistics`.
        upstream: upstream gradients of KL and label log-prob.
        out: (N, V) tensor to write into, of any float dtype; ``rows.logits`` itself is allowed. The default is a new
            tensor like ``rows.logits``.

    Returns:
        (N, V): ``out``, or a tensor in the dtype of the logits.
    """
    dtype = statistics.lse.dtype
    kept = (rows.labels != IGNORE_INDEX)[:, None]
    grad_kl, grad_logp = (grad.to(dtype)[:, None] for grad in upstream)
    lse, mean, level = (part[:, None] for part in (statistics.lse, statistics.mean, statistics.level))
    # Outside S the gradient is that of a log-prob, dense (onehot - p). Only the label's column needs another factor for
    # the onehot, so it is computed separately.
    dense = grad_logp - grad_kl * (level - mean)
    # These columns are read before the first row is written, because out may be the logits.
    label = rows.labels.clamp_min(0)[:, None]
    z_label, z = rows.logits.gather(-1, label).to(dtype), rows.logits.gather(-1, rows.ids).to(dtype)
    at_label = slope(z_label, options) * (grad_logp - _probability(z_label, lse, options) * dense)
    p, u = _cells(z, lse, rows.logp, options)
    at_top = slope(z, options) * (p * (grad_kl * (u - mean) - grad_logp) + grad_logp * (rows.ids == label))
    # The policy is passed as its own reference, because only the gradient of a log-prob is needed here.
    own = options._replace(ref_softcap=options.softcap)
    zeros = torch.zeros_like(statistics.lse)
    out = backend_for(rows.logits, own).backward(
        Rows(rows.logits, rows.logits, rows.labels),
        RowStatistics(zeros, zeros, zeros, statistics.lse, zeros.double()),
        Upstream(zeros, dense[:, 0]),
        own,
        out,
    )
    # These columns replace the dense part. If they were added to it, a 16-bit sum would keep the roundings of both.
    row = torch.arange(len(label), device=label.device)[:, None]
    info = torch.finfo(out.dtype)
    for index, value in ((label, at_label), (rows.ids, at_top)):
        out[row, index] = torch.where(kept, value.clamp(info.min, info.max), 0.0).to(out.dtype)
    return out


class TopKRowsKL(torch.autograd.Function):
    """(*TopKRows, options) -> TopKStatistics; kl and logp are differentiable."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        """Compute the statistics of the rows."""
        rows, options = named(args, TopKRows)
        check_labels(rows.labels, rows.logits.shape[-1])
        with torch.autocast(rows.logits.device.type, enabled=False):
            return tuple(top_k_statistics(rows, options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save the logits, which the model keeps anyway, the reference, and six numbers per row."""
        *rows, ctx.options = inputs
        ctx.save_for_backward(*rows, *output)
        ctx.mark_non_differentiable(*output[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Compute both gradients at once, in the dtype of the logits."""
        given = TopKStatistics(*grads)
        upstream = Upstream(given.kl, given.logp)
        return for_each_argument(ctx, top_k_gradient(*ctx.saved_tensors, *upstream, ctx.options))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Treat a batch of rows as more rows."""
        found = top_k_rows(*flattened(info, in_dims, args))
        return tuple(part.reshape(info.batch_size, -1) for part in found), (0,) * len(found)


class TopKGradient(BackwardPass):
    """The backward pass of :class:`TopKRowsKL`: (*TopKRows, *TopKStatistics, *Upstream, options) -> gradient (N, V)."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        """Compute the gradient with respect to the policy's logits."""
        rows, statistics, upstream, options = named(args, TopKRows, TopKStatistics, Upstream)
        with torch.autocast(rows.logits.device.type, enabled=False):
            return top_k_gradients(rows, statistics, upstream, options)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        """Treat a batch of rows as more rows."""
        rows = flattened(info, in_dims, args)
        return top_k_gradient(*rows).reshape(info.batch_size, -1, rows[0].shape[-1]), 0


def slope(logits: Tensor, options: Options) -> Tensor | float:
    """Return the derivative of a scaled and soft-capped logit with respect to the logit."""
    if options.softcap is None:
        return options.scale
    return options.scale * (1 - torch.tanh(logits / options.softcap).square())


top_k_rows: Callable[..., tuple[Tensor, ...]] = TopKRowsKL.apply
"""Apply :class:`TopKRowsKL`."""

top_k_gradient: Callable[..., Tensor] = TopKGradient.apply
"""Apply :class:`TopKGradient`."""


def _check_ids(ids: Tensor, vocabulary: int) -> None:
    valid = ((ids >= 0) & (ids < vocabulary)).all()
    message = f"reference.ids hold a token outside the vocabulary of {vocabulary}"
    if ids.device.type != "cpu":
        torch._assert_async(valid, f"kl-plugins: {message}")
    elif not valid:
        raise ValueError(message)


def _tile_statistics(rows: TopKRows, options: Options, dtype: torch.dtype) -> TopKStatistics:
    kept = rows.labels != IGNORE_INDEX
    top, label = rows.logits.gather(-1, rows.ids).double(), rows.labels.clamp_min(0)[:, None]
    z_label = scaled(rows.logits.gather(-1, label)[:, 0].double(), options.scale, options.softcap)
    log_tail = tail_log_sum_exp(rows.logits, rows.ids, options.scale, options.softcap)
    lse = torch.logaddexp(scaled(top, options.scale, options.softcap).logsumexp(-1), log_tail)
    p, u = _cells(top, lse[:, None], rows.logp, options)
    bucket = torch.exp(log_tail - lse)
    level = (log_tail - lse - rows.log_tail.double()).clamp(-LINEAR_LIMIT, LINEAR_LIMIT)
    level = level.masked_fill(bucket == 0, 0.0)
    kl, mean = cells_divergence(
        torch.cat([p, bucket[:, None]], -1),
        torch.cat([u, level[:, None]], -1),
        torch.cat([rows.logp, rows.log_tail[:, None]], -1).double().exp(),
    )
    logp = (z_label - lse).clamp(-LINEAR_LIMIT, 0.0)
    outside = kept & (rows.ids != label).all(-1)
    inside = (logp - rows.label_logp.double() - level).clamp(-LINEAR_LIMIT, LINEAR_LIMIT)
    found = (kl.clamp(0.0, LINEAR_LIMIT), logp, torch.where(outside, inside, 0.0), lse, mean, level)
    return TopKStatistics(*(part.masked_fill(~kept, 0.0).to(dtype) for part in found))


def _probability(logits: Tensor, lse: Tensor, options: Options) -> Tensor:
    return torch.exp((scaled(logits, options.scale, options.softcap) - lse).clamp(max=0.0))


def _cells(logits: Tensor, lse: Tensor, ref_logp: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Return (N, k) the probability p of the tokens in S, and (N, k) u = log(p / r), nats, within 1e4."""
    logp = (scaled(logits, options.scale, options.softcap) - lse).clamp(max=0.0)
    p, u = logp.exp(), (logp - ref_logp.to(logp.dtype)).clamp(-LINEAR_LIMIT, LINEAR_LIMIT)
    # Where the policy has no mass, p u is 0 for every u. This also removes the NaN of -inf - (-inf).
    return p, u.masked_fill(p == 0, 0.0)


def cells_divergence(p: Tensor, u: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Return the KL (N,) of cells (N, k + 1) and their mean log-ratio (N,), both in nats and float64.

    Args:
        p: (N, k + 1) probabilities under the policy, float64.
        u: (N, k + 1) log(p / r), nats; any number where p is 0.
        r: (N, k + 1) probabilities under the reference.
    """
    # p exp(-u) equals r. Where the policy has no mass, the term is r itself.
    second = torch.where((u.abs() < 0.5) & (p > 0), p * (torch.expm1(-u) + u), r - p + p * u)
    return second.sum(-1), (p * u).sum(-1)
