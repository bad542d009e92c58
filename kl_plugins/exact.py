"""Full-vocabulary KL per token, from logits or from hidden states: the public face of the exact kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar, overload

import torch

from kl_plugins.kernels.exact.arguments import (
    check_floats,
    check_head,
    checked_labels,
    flat_rows,
    loss_weight,
    row_options,
)
from kl_plugins.kernels.exact.autograd import named
from kl_plugins.kernels.exact.linear import Gradients, LinearInputs, default_tile_bytes
from kl_plugins.kernels.exact.linear_autograd import linear_loss, linear_rows, wanted_gradients
from kl_plugins.kernels.exact.logits import logits_kl
from kl_plugins.kernels.exact.products import operand_dtype
from kl_plugins.kernels.exact.statistics import IGNORE_INDEX, Options, RowStatistics, Upstream
from kl_plugins.kernels.exact.top_k import top_k
from kl_plugins.numerics import Limits, masked_difference

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


_F = TypeVar("_F", bound="Callable[..., object]")


def _opaque(function: _F) -> _F:
    # An outer torch.compile calls these as they are: they choose and compile their own kernels.
    disabled: _F = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


DEFAULT_BOUND = 30.0
"""Largest log-weight of a sampled tail, as a spec's ``bound`` has it by default."""


class ExactKL(NamedTuple):
    """Per-token results, float32: full-vocabulary KL (nats), log-prob of the label under policy and reference."""

    kl: Tensor
    logp: Tensor
    ref_logp: Tensor


class ExactKLLoss(NamedTuple):
    """A loss (0-d) whose gradient is known already, and the per-token results it was made of, detached."""

    loss: Tensor
    kl: Tensor
    logp: Tensor
    ref_logp: Tensor


@_opaque
def exact_kl(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    top: int | None = None,
    behaviour_logp: Tensor | None = None,
    backend: str = "auto",
    max_tile_bytes: int | None = None,
) -> ExactKL:
    """KL(policy || reference) over the whole vocabulary, and the labels' log-probs.

    See ``docs/exact.md`` for the form that is computed and its accuracy.

    Args:
        logits: (..., V) of the policy, any float dtype, with their graph; read as float32 (float64 stays).
        ref_logits: (..., V) of the reference; no gradient flows to them.
        labels: (...) int64 tokens; -100 leaves a position out.
        mask: (...) True where a position counts; the others give 0 and no gradient, whatever they hold.
        temperature: divides the logits of both, as in sampling.
        softcap, ref_softcap: final logit soft-caps, for logits that were taken before the model's own capping.
        top: only the policy's ``top`` most probable tokens are summed, the others enter by the sampled label, unbiased
            (a spec's ``top:<k>``); None for all.
        behaviour_logp: (...) log-probs of the policy that drew the labels, nats, for ``top`` on off-policy data: what
            ``is:prefix`` and ``is:decision`` need (their weight ends one token earlier). Else leave it out.
        backend: ``auto``, ``eager``, ``compiled`` or ``triton``; ``auto`` heeds ``KL_PLUGINS_EXACT_BACKEND``.
        max_tile_bytes: bound on temporaries beside arguments, results and the gradient (one row's at least).

    Returns:
        kl, logp, ref_logp, each (...), float32 (float64 for float64 logits), nats. kl and logp are differentiable.
        An infinite divergence or log-prob (-inf logits) saturates at 1e4 nats.

    Raises:
        ValueError: a shape, label or option that cannot be.
        TypeError: a dtype that cannot be.
        BackendError: the backend asked for is unknown or cannot be used here.
    """
    check_floats(logits=logits, ref_logits=ref_logits)
    if logits.dim() < 1 or logits.shape != ref_logits.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and ref_logits {tuple(ref_logits.shape)} must be one (..., V)")
    shape = logits.shape[:-1]
    labels = checked_labels(labels, mask, shape)
    options = row_options(temperature, softcap, ref_softcap, backend, max_tile_bytes)
    rows = (flat_rows(logits), flat_rows(ref_logits.detach()), labels.reshape(-1))
    if top is None:
        if behaviour_logp is not None:
            raise ValueError("behaviour_logp weights the sampled tail of top=; without top nothing is sampled")
        kl, logp, ref_logp, *_ = logits_kl(*rows, options)
    else:
        if top < 1:
            raise ValueError(f"top={top}: must be at least 1")
        weight = None if behaviour_logp is None else _tail_weight(rows, behaviour_logp, options)
        kl, logp, ref_logp, *_ = top_k(*rows, weight, top, options)
    return ExactKL(kl.reshape(shape), logp.reshape(shape), ref_logp.reshape(shape))


@overload
def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = ...,
    ref_bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    temperature: float = ...,
    softcap: float | None = ...,
    ref_softcap: float | None = ...,
    kl_weight: None = ...,
    logp_weight: None = ...,
    differentiable_logp: bool = ...,
    backend: str = ...,
    max_tile_bytes: int | None = ...,
) -> ExactKL: ...


@overload
def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = ...,
    ref_bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    temperature: float = ...,
    softcap: float | None = ...,
    ref_softcap: float | None = ...,
    kl_weight: Tensor,
    logp_weight: Tensor | None = ...,
    backend: str = ...,
    max_tile_bytes: int | None = ...,
) -> ExactKLLoss: ...


@_opaque
def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    kl_weight: Tensor | None = None,
    logp_weight: Tensor | None = None,
    differentiable_logp: bool = True,
    backend: str = "auto",
    max_tile_bytes: int | None = None,
) -> ExactKL | ExactKLLoss:
    """The same as :func:`exact_kl`, from what goes into the output heads: the logits are never there as a whole.

    Without weights, kl and logp take any upstream gradient, and logits are computed again in the backward pass. With
    ``kl_weight`` the result is the loss sum(kl_weight kl + logp_weight logp), and its gradient is computed at once.

    Args:
        hidden: (..., D) final hidden states of the policy, with their graph.
        weight: (V, D) of the policy's head, whole (under FSDP: where the head is gathered). Frozen: costs less.
        ref_hidden: (..., D') of the reference.
        ref_weight: (V, D') of the reference's head.
        labels: (...) int64 tokens; -100 leaves a position out, and its products are not computed.
        bias, ref_bias: (V,), None for none.
        mask: (...) True where a position counts.
        temperature, softcap, ref_softcap, backend: as in :func:`exact_kl`.
        kl_weight, logp_weight: (...) weights of the loss, detached; beta and the host's normalisation belong in them.
        differentiable_logp: False returns logp detached; with a frozen head the backward pass is then free.
        max_tile_bytes: bound on what is neither argument, result nor gradient (one row's tiles at least). Default
            1 GiB on an accelerator; on a CPU 128 MiB, or what 128 rows of both logits need where that is more.

    Returns:
        :class:`ExactKL`, or :class:`ExactKLLoss` if ``kl_weight`` or ``logp_weight`` is given.

    Raises:
        ValueError: a shape, label or option that cannot be.
        TypeError: a dtype that cannot be, or a sharded weight.
        BackendError: the backend asked for is unknown or cannot be used here.
    """
    check_floats(hidden=hidden, weight=weight, ref_hidden=ref_hidden, ref_weight=ref_weight)
    check_head(hidden, weight, bias, "")
    check_head(ref_hidden, ref_weight, ref_bias, "ref_")
    shape = hidden.shape[:-1]
    if ref_hidden.shape[:-1] != shape or ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"policy {tuple(hidden.shape)} x {tuple(weight.shape)} and reference {tuple(ref_hidden.shape)} x "
            f"{tuple(ref_weight.shape)} must have the same positions and the same vocabulary"
        )
    if max_tile_bytes is None:
        max_tile_bytes = default_tile_bytes(hidden, weight.shape[0])
    inputs = LinearInputs(
        flat_rows(hidden),
        weight,
        bias,
        flat_rows(ref_hidden.detach()),
        ref_weight.detach(),
        None if ref_bias is None else ref_bias.detach(),
        checked_labels(labels, mask, shape).reshape(-1),
        row_options(temperature, softcap, ref_softcap, backend, max_tile_bytes),
        (operand_dtype(hidden, weight), operand_dtype(ref_hidden, ref_weight)),
        max_tile_bytes,
    )
    wanted = wanted_gradients(inputs)
    if kl_weight is None and logp_weight is None:
        rows_first = wanted.hidden and not (wanted.weight or wanted.bias or differentiable_logp)
        found, *_ = named(linear_rows(*inputs, rows_first), RowStatistics)
        kl, logp, ref_logp = (part.reshape(shape) for part in (found.kl, found.logp, found.ref_logp))
        return ExactKL(kl, logp if differentiable_logp else logp.detach(), ref_logp)
    weights = Upstream(loss_weight(kl_weight, shape, hidden), loss_weight(logp_weight, shape, hidden))
    _, loss, *rows = named(linear_loss(*inputs, *weights, *wanted), Gradients)
    return ExactKLLoss(loss, *(part.reshape(shape) for part in rows))


def _tail_weight(rows: tuple[Tensor, Tensor, Tensor], behaviour_logp: Tensor, options: Options) -> Tensor:
    if behaviour_logp.numel() != rows[2].numel():
        raise ValueError(f"behaviour_logp {tuple(behaviour_logp.shape)}: must be one per position")
    with torch.no_grad():
        logp = logits_kl(*rows, options)[1]
    kept = (rows[2] != IGNORE_INDEX)[None]
    log_weight = masked_difference(logp[None], behaviour_logp.detach().reshape(1, -1), kept, logp.dtype)
    return Limits.of(logp.dtype, DEFAULT_BOUND).exponent(log_weight)[0].exp()
