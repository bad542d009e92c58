"""The KL over set and bucket of :mod:`bucket`, from the policy's log-probs of the set instead of its logits.

A host computes the log-prob of each label anyway, with a pass over the whole vocabulary. Then the log-prob of another
token a is known from two logits z alone, log p_a = z_a - z_label + log p_label, and its gradient goes through the
host's own backward pass. So a KL over k tokens adds no pass over the vocabulary, forward or backward.

The bucket's probability P is 1 minus the sum over the set here, and it has an absolute error of about 1e-6 in float32.
The estimate stays unbiased with such an error, because L = log(P / R) cancels between the bucket and the remainder,
both in the value and in the gradient. Only the noise of the remainder depends on L.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kl_plugins.kernels.exact.bucket import TopKReference, cells_divergence
from kl_plugins.kernels.exact.draws import with_draws
from kl_plugins.kernels.exact.reference import RefDraws
from kl_plugins.kernels.memory import zeros
from kl_plugins.numerics import LINEAR_LIMIT

SMALLEST_TAIL = 2.0**-24
"""Smallest probability that a tail computed as a difference from 1 can have. Rounding makes smaller ones unreliable."""


class KeptKL(NamedTuple):
    """Results per row, (N,) each, float32 (float64 for float64 log-probs), nats; 0 in ignored rows.

    Attributes:
        kl: KL of the k + 1 cells, in [0, 1e4].
        remainder: u - L of a label outside the set, within 1e4; 0 for a label in the set.
        slopes: (N, k) derivative of the KL by the log-prob of each token of the set, p (u - L).
        level: L, within 1e4; 0 where the policy's bucket is empty.
    """

    kl: Tensor
    remainder: Tensor
    slopes: Tensor
    level: Tensor


class SelectedLogits(torch.autograd.Function):
    """(logits (..., V), ids (..., k)) -> logits of these ids (..., k).

    It is ``gather``, whose gradient is written into huge pages: most of its time is that of allocating its memory.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, ids: Tensor) -> Tensor:
        """Select the logits."""
        return logits.gather(-1, ids)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Keep the ids, and of the logits only what they look like."""
        logits, ids = inputs
        ctx.save_for_backward(ids)
        ctx.logits = logits.shape, logits.dtype, logits.device

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Put the gradient at the places of the ids."""
        (ids,) = ctx.saved_tensors
        return zeros(*ctx.logits).scatter_add_(-1, ids, grads[0]), None


class GradientLeft(torch.autograd.Function):
    """(logits (..., V), ids (..., k), left) -> logits of these ids (..., k); its gradient is put into ``left``."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, left: list[Tensor]) -> Tensor:
        """Select the logits."""
        ctx.left = left
        return logits.gather(-1, ids)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        """Leave the gradient to the hook of :func:`selected_logits_shared`, which runs later in the same pass."""
        ctx.left[:] = grads
        return None, None, None


gradient_left: Callable[[Tensor, Tensor, list[Tensor]], Tensor] = GradientLeft.apply
"""Apply :class:`GradientLeft`."""


def selected_logits_shared(logits: Tensor, ids: Tensor) -> Tensor:
    """Do what :func:`selected_logits` does, without a dense gradient (..., V) of its own.

    Its gradient is added in place to the gradient that the logits get from elsewhere. Autograd calls a hook of a tensor
    when the tensor's gradient is complete. If the logits are a view of a tensor of the same size, the hook is on that
    tensor, because other uses of it do not go through the view. The functions that compute log-probs and entropies
    return a gradient that nothing else refers to, so it can be changed in place.
    """
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return logits.gather(-1, ids)
    whole = logits if logits._base is None else logits._base
    if whole.numel() != logits.numel() or not (whole.is_contiguous() and logits.is_contiguous()):
        return selected_logits(logits, ids)
    left: list[Tensor] = []
    shape = logits.shape

    def add(gradient: Tensor | None) -> Tensor | None:
        if not left:
            return gradient
        ours = left.pop()
        if gradient is None:
            raise RuntimeError("kl-plugins: share_grad=True, but the logits have no other gradient; leave it out")
        gradient = gradient.contiguous()  # that of a sum is one number in the memory
        gradient.view(shape).scatter_add_(-1, ids, ours.to(gradient.dtype))
        return gradient

    whole.register_hook(add)  # type: ignore[no-untyped-call]
    return gradient_left(logits, ids, left)


class KeptRowsKL(torch.autograd.Function):
    """(log_probs, logp, kept, in_set, *TopKReference without ids) -> KeptKL; only kl is differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        log_probs: Tensor,
        logp: Tensor,
        kept: Tensor,
        in_set: Tensor,
        ref_logp: Tensor,
        log_tail: Tensor,
        label_logp: Tensor,
    ) -> tuple[Tensor, ...]:
        """Compute the results of the rows; the k + 1 numbers of each are computed in float64."""
        with torch.autocast(log_probs.device.type, enabled=False):
            ours, theirs = log_probs.double().clamp(max=0.0), ref_logp.double()
            p = ours.exp()
            u = (ours - theirs).clamp(-LINEAR_LIMIT, LINEAR_LIMIT).masked_fill(p == 0, 0.0)
            # A set of the whole vocabulary has no bucket, so rounding must not give the policy's one a probability.
            no_bucket = log_tail == -torch.inf
            bucket = (1.0 - p.sum(-1)).clamp_min(0.0).masked_fill(no_bucket, 0.0)
            empty = bucket == 0
            level = (bucket.log() - log_tail.double()).masked_fill(empty, 0.0).clamp(-LINEAR_LIMIT, LINEAR_LIMIT)
            kl, _ = cells_divergence(
                torch.cat([p, bucket[:, None]], -1),
                torch.cat([u, level[:, None]], -1),
                torch.cat([theirs, log_tail.double()[:, None]], -1).exp(),
            )
            inside = (logp.double() - label_logp.double() - level).clamp(-LINEAR_LIMIT, LINEAR_LIMIT)
            slopes = (p * (u - level[:, None])).masked_fill(~kept[:, None], 0.0)
            found = KeptKL(
                kl.clamp(0.0, LINEAR_LIMIT).masked_fill(~kept, 0.0),
                inside.masked_fill(in_set | ~kept, 0.0),
                slopes,
                level.masked_fill(~kept, 0.0),
            )
            results = tuple(part.to(log_probs.dtype) for part in found)
        ctx.save_for_backward(results[2])
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply the slopes by the upstream gradient."""
        (slopes,) = ctx.saved_tensors
        return (grads[0][:, None] * slopes, *(None,) * 6)


selected_logits: Callable[[Tensor, Tensor], Tensor] = SelectedLogits.apply
"""Apply :class:`SelectedLogits`."""

kept_rows: Callable[..., tuple[Tensor, ...]] = KeptRowsKL.apply
"""Apply :class:`KeptRowsKL`."""


def kl_of_log_probs(
    log_probs: Tensor,
    logp: Tensor,
    labels: Tensor,
    kept: Tensor,
    reference: TopKReference,
    draws: RefDraws | None = None,
) -> KeptKL:
    """Compute the KL over set and bucket from log-probs, and what draws of the reference add to it.

    Args:
        log_probs: (N, k + m) log-probs of the reference's ids and of the draws under the policy, nats, float32 or
            float64, with their graph.
        logp: (N,) log-probs of the labels under the policy, nats.
        labels: (N,) int64.
        kept: (N,) bool; other rows may hold any numbers and get 0 and no gradient.
        reference: the reference of the rows.
        draws: tokens that the reference drew in the rows.
    """
    k = reference.ids.shape[-1]
    in_set = (reference.ids == labels[:, None]).any(-1)
    given = (log_probs[:, :k], logp.detach(), kept, in_set, reference.logp, reference.log_tail, reference.label_logp)
    found = KeptKL(*kept_rows(*given))
    if draws is None:
        return found
    kl, remainder = with_draws(found.kl, found.remainder, found.level, log_probs[:, k:], logp, kept, draws)
    return found._replace(kl=kl, remainder=remainder)


def log_of_tail(log_probs: Tensor) -> Tensor:
    """Return the log of the probability that some log-probs (..., k) leave for all other tokens; (...), nats."""
    left = 1.0 - log_probs.double().exp().sum(-1)
    return left.clamp_min(SMALLEST_TAIL).log().to(log_probs.dtype)
