"""The KL over a fixed set of tokens and one bucket for all others, from the reference's most probable tokens alone.

With S a set of k tokens per state that does not depend on the drawn one, p and r the probabilities of policy and
reference, P and R what they leave outside S, u_a = log(p_a / r_a) and L = log(P / R),

    KL = sum_S p u + P L + E_{a ~ p}[1{a not in S} (u_a - L)].

Sum and bucket are the KL of k + 1 cells: exact, at least 0, a lower bound of the KL, and differentiable. The last term
is what happens inside the bucket. Its gradient is that of one sampled coefficient, u_a - L on the log-prob of the drawn
token. So the estimate is unbiased for any S, and the noise is that of the tail alone.

The value is computed as sum p k3(u) over the cells, with k3(u) = exp(-u) - 1 + u. Both are equal, because
sum p exp(-u) = 1. An error that all u have in common, such as a rounded log-sum-exp, then enters in second order only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kl_plugins.kernels.exact import eager
from kl_plugins.kernels.exact.backends import backend_for
from kl_plugins.kernels.exact.logits import check_labels
from kl_plugins.kernels.exact.statistics import IGNORE_INDEX, Options, Rows, RowStatistics, Upstream, scaled
from kl_plugins.kernels.exact.top_k import slope
from kl_plugins.numerics import LINEAR_LIMIT


class RefTopK(NamedTuple):
    """What is kept of a reference's distribution: 2 k + 1 numbers per state.

    Attributes:
        ids: (..., k) int64, the reference's most probable tokens.
        logp: (..., k) float32, their log-probs under the reference, nats.
        log_tail: (...) float32, log of the probability that they leave, nats; -inf where they are the vocabulary.
        temperature: that the reference's logits were divided by; the policy's has to be the same.
    """

    ids: Tensor
    logp: Tensor
    log_tail: Tensor
    temperature: float = 1.0

    def rows(self) -> RefTopK:
        """The same with one leading dimension."""
        return RefTopK(self.ids.flatten(0, -2), self.logp.flatten(0, -2), self.log_tail.reshape(-1), self.temperature)


def tail_log_sum_exp(
    logits: Tensor, ids: Tensor, scale: float, softcap: float | None, tile_bytes: int | None = None
) -> Tensor:
    """(N,) float32: log-sum-exp of the scaled logits of all tokens but some.

    Args:
        logits: (N, V), any float dtype.
        ids: (N, k) int64, the tokens to leave out.
        scale: 1 / temperature.
        softcap: of the model's final logits, or None.
        tile_bytes: bound on temporaries; at least one row's are needed.

    Returns:
        By a maximum of its own, never as a difference of sums: a tail of 1e-30 keeps its digits. -inf for no token.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    found = [
        torch.logsumexp(scaled(logits[rows].to(dtype), scale, softcap).scatter(-1, ids[rows], -torch.inf), -1)
        for rows in eager.tiles(logits, tile_bytes or eager.TILE_BYTES, dtype)
    ]
    return torch.cat(found) if found else logits.new_zeros(0, dtype=dtype)


def reference_rows(logits: Tensor, k: int, options: Options) -> RefTopK:
    """The k most probable tokens of each row, (N, V) logits of the reference."""
    with torch.no_grad():
        dtype = torch.promote_types(logits.dtype, torch.float32)
        top = logits.topk(min(k, logits.shape[-1]), -1)
        z = scaled(top.values.to(dtype), options.scale, options.softcap)
        log_tail = tail_log_sum_exp(logits, top.indices, options.scale, options.softcap, options.tile_bytes)
        lse = torch.logaddexp(torch.logsumexp(z, -1), log_tail)
        return RefTopK(top.indices, z - lse[:, None], log_tail - lse, 1.0 / options.scale)


class Cells(NamedTuple):
    """The k tokens and the bucket of each row, from the policy's side.

    Attributes:
        p: (N, k) probabilities of the tokens; detached, as all others.
        bucket: (N,) probability of the bucket, P.
        u: (N, k) log(p / r), nats, within 1e4.
        level: (N,) L = log(P / R), nats; 0 where the bucket is empty.
    """

    p: Tensor
    bucket: Tensor
    u: Tensor
    level: Tensor


def cells_of(logits: Tensor, lse: Tensor, reference: RefTopK, options: Options) -> Cells:
    """Probabilities and log-ratios of the cells of rows (N, V), given the log-sum-exp of each."""
    dtype = lse.dtype
    logp = scaled(logits.gather(-1, reference.ids).to(dtype), options.scale, options.softcap) - lse[:, None]
    log_bucket = tail_log_sum_exp(logits, reference.ids, options.scale, options.softcap, options.tile_bytes) - lse
    bucket = log_bucket.exp()
    level = (log_bucket - reference.log_tail.to(dtype)).clamp(-LINEAR_LIMIT, LINEAR_LIMIT)
    u = (logp - reference.logp.to(dtype)).clamp(-LINEAR_LIMIT, LINEAR_LIMIT)
    p = logp.exp()
    # Where the policy has no mass, p u is 0 whatever u is; NaN from -inf - (-inf) must not come back.
    return Cells(p, bucket, torch.where(p > 0, u, 0.0), torch.where(bucket > 0, level, 0.0))


def divergence(cells: Cells, reference: RefTopK) -> tuple[Tensor, Tensor]:
    """(N,) the KL of the cells, and their mean log-ratio sum p u + P L, both nats."""
    p = torch.cat([cells.p, cells.bucket[:, None]], -1).double()
    u = torch.cat([cells.u, cells.level[:, None]], -1).double()
    r = torch.cat([reference.logp, reference.log_tail[:, None]], -1).double().exp()
    # p exp(-u) is r; where the policy has no mass, r is what counts.
    small = u.abs() < 0.5
    second = torch.where(small & (p > 0), p * (torch.expm1(-u) + u), r - p + p * u)
    return second.sum(-1).clamp(0.0, LINEAR_LIMIT), (p * u).sum(-1)


class BucketKL(torch.autograd.Function):
    """(logits, labels, ref_logp, reference, options) -> kl, remainder, logp; kl and logp are differentiable."""

    @staticmethod
    def forward(
        logits: Tensor, labels: Tensor, ref_logp: Tensor, ids: Tensor, ref_top: Tensor, log_tail: Tensor,
        options: Options,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """(N,) each; then what the backward pass needs."""
        check_labels(labels, logits.shape[-1])
        reference = RefTopK(ids, ref_top, log_tail)
        with torch.autocast(logits.device.type, enabled=False):
            # The policy is its own reference: what is wanted are log-sum-exp and log-prob.
            one_cap = options._replace(ref_softcap=options.softcap)
            rows = backend_for(logits, one_cap).forward(Rows(logits, logits, labels), one_cap)
            kept = labels != IGNORE_INDEX
            cells = cells_of(logits, rows.lse, reference, options)
            kl, mean = divergence(cells, reference)
            in_tail = kept & (ids != labels[:, None]).all(-1)
            inside = (rows.logp - ref_logp.to(rows.logp.dtype) - cells.level).clamp(-LINEAR_LIMIT, LINEAR_LIMIT)
            remainder = torch.where(in_tail, inside, 0.0)
            kl = kl.to(rows.lse.dtype).masked_fill(~kept, 0.0)
        return kl, remainder, rows.logp, rows.lse, *cells, mean.to(rows.lse.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the logits, and the cells, which are k + 2 numbers a row."""
        logits, labels, _, ids, _, _, ctx.options = inputs
        ctx.save_for_backward(logits, labels, ids, *output[3:])
        ctx.mark_non_differentiable(output[1], *output[3:])

    @staticmethod
    def backward(ctx: Any, grad_kl: Tensor, _: Any, grad_logp: Tensor, *__: Any) -> tuple[Any, ...]:
        """Gradient of the logits: p_j (u_j - mean) in S, p_j (L - mean) outside, and that of the log-prob."""
        logits, labels, ids, lse, p, _, u, level, mean = ctx.saved_tensors
        options: Options = ctx.options
        kept = (labels != IGNORE_INDEX)[:, None]
        grad_kl, grad_logp = (grad.to(lse.dtype) for grad in (grad_kl, grad_logp))
        with torch.autocast(logits.device.type, enabled=False):
            zeros = torch.zeros_like(lse)
            rows = RowStatistics(zeros, zeros, zeros, lse, zeros.double())
            # One dense part, that of a log-prob: dense (onehot_a - p). The label's entry is put right below.
            dense = grad_logp - grad_kl * (level - mean)
            one_cap = options._replace(ref_softcap=options.softcap)
            out = backend_for(logits, one_cap).backward(
                Rows(logits, logits, labels), rows, Upstream(torch.zeros_like(dense), dense), one_cap
            )
            label = labels.clamp_min(0)[:, None]
            for index, value in (
                (ids, grad_kl[:, None] * p * (u - level[:, None])),
                (label, (grad_kl * (level - mean))[:, None]),
            ):
                value = value * slope(logits.gather(-1, index).to(lse.dtype), options)
                out.scatter_add_(-1, index, torch.where(kept, value, 0.0).to(out.dtype))
        return out, *(None,) * 6


bucket_rows: Callable[..., tuple[Tensor, ...]] = BucketKL.apply
""":class:`BucketKL` as a function of (logits, labels, ref_logp, ids, logp of ids, log_tail, options)."""
