"""The policy's k most probable tokens exactly, the rest by the sampled token, without bias.

With u_i = log(p_i / ref_i), the gradient of KL is sum_i u_i grad p_i, every u detached: the derivative of u contributes
sum_i grad p_i = 0. Head and tail of that sum may be estimated apart:

    KL = sum_{i in S} p_i sg(u_i) + 1[a not in S] w r sg(u_a),   r = p_a / sg(p_a),   S the k largest p_i,

where w = p_a / behaviour_a is needed where a was not drawn from the policy. A head that differentiates u, beside a tail
r sg(u_a), would be biased by grad P(S) (arXiv 2602.04417's released code).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kl_plugins.kernels.exact.backends import backend_for
from kl_plugins.kernels.exact.logits import check_labels
from kl_plugins.kernels.exact.statistics import IGNORE_INDEX, Options, Rows, RowStatistics, Upstream, log_ratio, scaled


class TopK(torch.autograd.Function):
    """(logits, ref_logits, labels, tail_weight, k, options) -> kl and its kin; kl and logp are differentiable."""

    @staticmethod
    def forward(
        logits: Tensor, ref_logits: Tensor, labels: Tensor, tail_weight: Tensor | None, k: int, options: Options
    ) -> tuple[Tensor, ...]:
        """(N,) kl, logp, ref_logp; then what the backward pass needs."""
        check_labels(labels, logits.shape[-1])
        with torch.autocast(logits.device.type, enabled=False):
            rows = backend_for(logits, options).forward(Rows(logits, ref_logits, labels), options)
            kept = labels != IGNORE_INDEX
            top = logits.topk(min(k, logits.shape[-1]), -1).indices
            log_p, u = _at(top, logits, ref_logits, rows, options)
            _, u_label = _at(labels.clamp_min(0)[:, None], logits, ref_logits, rows, options)
            head = (log_p.exp() * u).sum(-1).masked_fill(~kept, 0.0)
            in_tail = kept & (top != labels[:, None]).all(-1)
            weight = 1.0 if tail_weight is None else tail_weight.to(head.dtype)
            tail = torch.where(in_tail, weight * u_label[:, 0], 0.0)
        return head + tail, rows.logp, rows.ref_logp, *rows[3:], rows.kl, top, head, tail

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the logits, a few numbers a row and the head's indices."""
        *rows, _, _, ctx.options = inputs
        ctx.save_for_backward(*rows, *output[1:])
        ctx.mark_non_differentiable(*output[2:])

    @staticmethod
    def backward(ctx: Any, grad_kl: Tensor, grad_logp: Tensor, *_: Any) -> tuple[Any, ...]:
        """Gradient of the logits."""
        return top_k_gradient(*ctx.saved_tensors, grad_kl, grad_logp, ctx.options), None, None, None, None, None


class TopKGradient(torch.autograd.Function):
    """The backward pass of :class:`TopK`; not differentiable again.

    The gradient is g sum_S p_i u_i (onehot_i - p) + (g tail + g_logp) (onehot_a - p): one dense part, that of a
    log-prob, and k + 1 entries added to it.
    """

    @staticmethod
    def forward(
        logits: Tensor,
        ref_logits: Tensor,
        labels: Tensor,
        logp: Tensor,
        ref_logp: Tensor,
        lse: Tensor,
        centre: Tensor,
        kl: Tensor,
        top: Tensor,
        head: Tensor,
        tail: Tensor,
        grad_kl: Tensor,
        grad_logp: Tensor,
        options: Options,
    ) -> Tensor:
        """(N, V) in the dtype of the logits."""
        rows = RowStatistics(kl, logp, ref_logp, lse, centre)
        kept = (labels != IGNORE_INDEX)[:, None]
        grad_kl, grad_logp = (grad.to(lse.dtype) for grad in (grad_kl, grad_logp))
        with torch.autocast(logits.device.type, enabled=False):
            dense = grad_kl * (head + tail) + grad_logp
            out = backend_for(logits, options).backward(
                Rows(logits, ref_logits, labels), rows, Upstream(torch.zeros_like(dense), dense), options
            )
            log_p, u = _at(top, logits, ref_logits, rows, options)
            # The dense part put the head's weight on the label.
            for index, value in (
                (top, grad_kl[:, None] * log_p.exp() * u),
                (labels.clamp_min(0)[:, None], -(grad_kl * head)[:, None]),
            ):
                value = value * slope(logits.gather(-1, index).to(lse.dtype), options)
                out.scatter_add_(-1, index, torch.where(kept, value, 0.0).to(out.dtype))
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Refuse."""
        raise NotImplementedError("the exact KL has no second derivatives")


def _at(
    index: Tensor, logits: Tensor, ref_logits: Tensor, rows: RowStatistics, options: Options
) -> tuple[Tensor, Tensor]:
    """log p and u of some tokens (N, n)."""
    dtype = rows.lse.dtype
    one, other = (x.gather(-1, index).to(dtype) for x in (logits, ref_logits))
    # log p - log ref = z - u - (lse - ref_lse), and the difference in brackets is E_p[z - u] - KL.
    u = log_ratio(one, other, options) - (rows.centre - rows.kl).to(dtype)[:, None]
    return (scaled(one, options.scale, options.softcap) - rows.lse[:, None]).clamp(max=0.0), u


def slope(logits: Tensor, options: Options) -> Tensor | float:
    """Derivative of a scaled and soft-capped logit with respect to the logit."""
    if options.softcap is None:
        return options.scale
    return options.scale * (1 - torch.tanh(logits / options.softcap).square())


top_k: Callable[..., tuple[Tensor, ...]] = TopK.apply
""":class:`TopK` as the function it is."""

top_k_gradient: Callable[..., Tensor] = TopKGradient.apply
""":class:`TopKGradient` as the function it is."""
