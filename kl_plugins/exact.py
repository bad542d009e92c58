"""Exact KL per token over the whole vocabulary, or over a set and a bucket, from logits or from hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar, overload

import torch

from kl_plugins.kernels.exact.arguments import (
    check_floats,
    check_head,
    checked_labels,
    checked_reference,
    flat_rows,
    loss_weight,
    row_options,
)
from kl_plugins.kernels.exact.autograd import named
from kl_plugins.kernels.exact.bucket import TopKReference, TopKStatistics, top_k_rows
from kl_plugins.kernels.exact.draws import with_draws
from kl_plugins.kernels.exact.kept_log_probs import selected_logits
from kl_plugins.kernels.exact.linear import Gradients, LinearInputs, default_tile_bytes
from kl_plugins.kernels.exact.linear_autograd import linear_loss, linear_rows, wanted_gradients
from kl_plugins.kernels.exact.logits import logits_kl
from kl_plugins.kernels.exact.products import operand_dtype
from kl_plugins.kernels.exact.reference import RefDraws, RefTopK
from kl_plugins.kernels.exact.selected_products import selected_products
from kl_plugins.kernels.exact.statistics import IGNORE_INDEX, Options, Upstream, scaled

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


_F = TypeVar("_F", bound="Callable[..., object]")


def _opaque(function: _F) -> _F:
    # torch.compile of a caller skips these functions, because they choose and compile their kernels themselves.
    disabled: _F = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


class ExactKL(NamedTuple):
    """Per-token results, float32: full-vocabulary KL (nats), log-prob of the label under policy and reference."""

    kl: Tensor
    logp: Tensor
    ref_logp: Tensor


class TopKKL(NamedTuple):
    """Per-token results if the reference is a :class:`~kl_plugins.reference.RefTopK`, float32, nats.

    Attributes:
        kl: KL over the k tokens and the bucket of all others: exact, at least 0, and at most the whole KL. If the
            reference has draws, plus their estimate of the rest, of any sign.
        logp, ref_logp: log-prob of the label under policy and reference.
        remainder: detached contribution of the sampled label: its log-ratio minus the bucket's log-ratio if it is not
            one of the k tokens, else 0. If the reference has draws, times the label's share. It is a coefficient on
            the label's log-prob: pass it to ``kl_term(..., remainder=)``.
    """

    kl: Tensor
    logp: Tensor
    ref_logp: Tensor
    remainder: Tensor


class ExactKLLoss(NamedTuple):
    """A scalar loss whose gradient was computed in the forward pass, and the detached results per token."""

    loss: Tensor
    kl: Tensor
    logp: Tensor
    ref_logp: Tensor


@overload
def exact_kl(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    *,
    reference: None = ...,
    mask: Tensor | None = ...,
    temperature: float = ...,
    softcap: float | None = ...,
    ref_softcap: float | None = ...,
    backend: str = ...,
    max_tile_bytes: int | None = ...,
) -> ExactKL: ...


@overload
def exact_kl(
    logits: Tensor,
    ref_logits: None,
    labels: Tensor,
    *,
    reference: RefTopK,
    ref_logp: Tensor,
    mask: Tensor | None = ...,
    temperature: float = ...,
    softcap: float | None = ...,
    backend: str = ...,
    max_tile_bytes: int | None = ...,
) -> TopKKL: ...


@_opaque
def exact_kl(
    logits: Tensor,
    ref_logits: Tensor | None,
    labels: Tensor,
    *,
    reference: RefTopK | None = None,
    ref_logp: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    backend: str = "auto",
    max_tile_bytes: int | None = None,
) -> ExactKL | TopKKL:
    """Compute KL(policy || reference) over the whole vocabulary, and the labels' log-probs.

    See ``docs/exact.md`` for the form that is computed and its accuracy. With ``reference``, the KL is taken over the
    reference's k most probable tokens and one bucket for all others, which needs no logits of the reference.

    Args:
        logits: (..., V) logits of the policy, any float dtype, with their graph; computed in float32 (float64 for
            float64 logits).
        ref_logits: (..., V) logits of the reference; no gradient flows to them. None if ``reference`` is given.
        labels: (...) int64 tokens; -100 leaves a position out.
        reference: result of :func:`kl_plugins.reference_top_k` for the same positions, or of
            :func:`kl_plugins.top_k.reference_of`, possibly with draws; see :func:`kl_plugins.top_k.top_k_kl`.
        ref_logp: (...) log-probs of the labels under the reference, nats; required with ``reference``.
        mask: (...) True for positions to use. All other positions give 0 and no gradient, even if they hold NaN.
        temperature: divides the logits of both models, as in sampling.
        softcap, ref_softcap: final logit soft-caps, for logits that were taken before the model's own capping.
            ``reference`` already includes its soft-cap.
        backend: ``auto``, ``eager``, ``compiled`` or ``triton``; ``auto`` reads ``KL_PLUGINS_EXACT_BACKEND``.
        max_tile_bytes: upper limit of temporary memory in bytes. Arguments, results and the gradient are not counted,
            and the temporaries of at least one row are allocated.

    Returns:
        :class:`ExactKL`, or :class:`TopKKL` with ``reference``: each (...), float32 (float64 for float64 logits), nats.
        kl and logp are differentiable. An infinite divergence or log-prob (-inf logits) saturates at 1e4 nats.

    Raises:
        ValueError: if a shape, label or option is invalid, or the temperature differs from that of ``reference``.
        TypeError: if a dtype is not supported.
        BackendError: if the backend is unknown or cannot be used here.
    """
    if logits.dim() < 1:
        raise ValueError(f"logits {tuple(logits.shape)} must be (..., V)")
    shape = logits.shape[:-1]
    options = row_options(temperature, softcap, ref_softcap, backend, max_tile_bytes)
    labels = checked_labels(labels, mask, shape).reshape(-1)
    if reference is not None:
        if ref_logits is not None or ref_softcap is not None:
            raise ValueError("reference= takes the place of ref_logits and ref_softcap")
        check_floats(logits=logits)
        given = TopKReference(*checked_reference(reference, ref_logp, labels, shape, options))
        rows = flat_rows(logits)
        found, *_ = named(top_k_rows(rows, labels, *given, options), TopKStatistics)
        if reference.draws is not None:
            draws = reference.draws.rows()
            chosen = selected_logits(rows, _tokens(draws, labels))
            found = _with_draws(found, chosen, labels, draws, options)
        return _top_k_result(found, given, shape)
    if ref_logits is None or ref_logp is not None:
        raise ValueError("pass ref_logits, or reference= with ref_logp=")
    check_floats(logits=logits, ref_logits=ref_logits)
    if logits.shape != ref_logits.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and ref_logits {tuple(ref_logits.shape)} must be one (..., V)")
    kl, logp, ref_label, *_ = logits_kl(flat_rows(logits), flat_rows(ref_logits.detach()), labels, options)
    return ExactKL(kl.reshape(shape), logp.reshape(shape), ref_label.reshape(shape))


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
    ref_hidden: None,
    ref_weight: None,
    labels: Tensor,
    *,
    reference: RefTopK,
    ref_logp: Tensor,
    bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    temperature: float = ...,
    softcap: float | None = ...,
    differentiable_logp: bool = ...,
    backend: str = ...,
    max_tile_bytes: int | None = ...,
) -> TopKKL: ...


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
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    labels: Tensor,
    *,
    reference: RefTopK | None = None,
    ref_logp: Tensor | None = None,
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
) -> ExactKL | ExactKLLoss | TopKKL:
    """Compute :func:`exact_kl` from hidden states and output heads, without ever storing all logits.

    Without weights, kl and logp take any upstream gradient, and logits are computed again in the backward pass. With
    ``kl_weight`` the result is the loss sum(kl_weight kl + logp_weight logp), and its gradient is computed at once.

    Args:
        hidden: (..., D) final hidden states of the policy, with their graph.
        weight: (V, D) weight of the policy's head, not sharded (under FSDP, call where the head is gathered). A frozen
            head costs less.
        ref_hidden: (..., D') final hidden states of the reference; None if ``reference`` is given.
        ref_weight: (V, D') weight of the reference's head; None if ``reference`` is given.
        labels: (...) int64 tokens; -100 leaves a position out, and its products are not computed.
        reference, ref_logp: as in :func:`exact_kl`, instead of the reference's head. They cannot be combined with
            weights of a loss. Draws add a second gradient of the weight, if it is trained, to the temporaries.
        bias, ref_bias: (V,) biases of the heads, None for no bias.
        mask: (...) True for positions to use.
        temperature, softcap, ref_softcap, backend: as in :func:`exact_kl`.
        kl_weight, logp_weight: (...) weights of the loss, detached. They must include beta and the host's
            normalisation.
        differentiable_logp: False returns logp detached; with a frozen head, and if the reference has no draws, the
            backward pass then needs no product.
        max_tile_bytes: upper limit of temporary memory in bytes. Arguments, results and gradients are not counted, and
            the tiles of at least one row are allocated. The default is 1300 MiB on an accelerator. On a CPU it is
            128 MiB, or the memory that 128 rows of both logits need if this is more.

    Returns:
        :class:`ExactKL`, :class:`ExactKLLoss` if ``kl_weight`` or ``logp_weight`` is given, or :class:`TopKKL` with
        ``reference``.

    Raises:
        ValueError: if a shape, label or option is invalid.
        TypeError: if a dtype is not supported, or a weight is sharded.
        BackendError: if the backend is unknown or cannot be used here.
    """
    shape = hidden.shape[:-1]
    check_floats(hidden=hidden, weight=weight)
    check_head(hidden, weight, bias, "")
    if max_tile_bytes is None:
        max_tile_bytes = default_tile_bytes(hidden, weight.shape[0])
    options = row_options(temperature, softcap, ref_softcap, backend, max_tile_bytes)
    labels = checked_labels(labels, mask, shape).reshape(-1)
    operands, top_k = operand_dtype(hidden, weight), None
    if reference is not None:
        if any(part is not None for part in (ref_hidden, ref_weight, ref_bias, ref_softcap)):
            raise ValueError("reference= takes the place of ref_hidden, ref_weight, ref_bias and ref_softcap")
        if kl_weight is not None or logp_weight is not None:
            raise ValueError("reference= has a remainder, so the gradient is not known before the loss: drop kl_weight")
        top_k = TopKReference(*checked_reference(reference, ref_logp, labels, shape, options))
        ref_operands = operands
    elif ref_hidden is None or ref_weight is None or ref_logp is not None:
        raise ValueError("pass ref_hidden and ref_weight, or reference= with ref_logp=")
    else:
        check_floats(hidden=hidden, ref_hidden=ref_hidden, ref_weight=ref_weight)
        check_head(ref_hidden, ref_weight, ref_bias, "ref_")
        if ref_hidden.shape[:-1] != shape or ref_weight.shape[0] != weight.shape[0]:
            raise ValueError(
                f"policy {tuple(hidden.shape)} x {tuple(weight.shape)} and reference {tuple(ref_hidden.shape)} x "
                f"{tuple(ref_weight.shape)} must have the same positions and the same vocabulary"
            )
        ref_operands = operand_dtype(ref_hidden, ref_weight)
    inputs = LinearInputs(
        flat_rows(hidden),
        weight,
        bias,
        None if ref_hidden is None else flat_rows(ref_hidden.detach()),
        None if ref_weight is None else ref_weight.detach(),
        None if ref_bias is None else ref_bias.detach(),
        labels,
        top_k,
        options,
        (operands, ref_operands),
        max_tile_bytes,
    )
    wanted = wanted_gradients(inputs)
    if kl_weight is None and logp_weight is None:
        draws = None if reference is None or reference.draws is None else reference.draws.rows()
        needs_logp = differentiable_logp or draws is not None
        rows_first = wanted.hidden and not (wanted.weight or wanted.bias or needs_logp)
        found, *_ = named(linear_rows(*inputs, rows_first), inputs.kind())
        if draws is not None and isinstance(found, TopKStatistics):
            found = _with_draws(found, _products(inputs, _tokens(draws, labels)), labels, draws, options)
        if not differentiable_logp:
            found = found._replace(logp=found.logp.detach())
        if top_k is not None:
            return _top_k_result(found, top_k, shape)
        return ExactKL(*(part.reshape(shape) for part in (found.kl, found.logp, found.ref_logp)))
    weights = Upstream(loss_weight(kl_weight, shape, hidden), loss_weight(logp_weight, shape, hidden))
    _, loss, *rows = named(linear_loss(*inputs, *weights, *wanted), Gradients)
    return ExactKLLoss(loss, *(part.reshape(shape) for part in rows))


def _tokens(draws: RefDraws, labels: Tensor) -> Tensor:
    """Return (N, m + 1) ids of the draws and of the label, 0 in ignored rows."""
    tokens = torch.cat([draws.ids, labels[:, None]], -1)
    return tokens.masked_fill((labels == IGNORE_INDEX)[:, None], 0)


def _products(inputs: LinearInputs, tokens: Tensor) -> Tensor:
    """Return the products (N, m + 1) of the head for some tokens; 0 in ignored rows, whose states may be NaN."""
    kept = (inputs.labels != IGNORE_INDEX).nonzero()[:, 0]
    given = (inputs.hidden[kept], inputs.weight, inputs.bias, tokens[kept], inputs.operands[0], inputs.tile_bytes)
    found = selected_products(*given)
    return found.new_zeros(tokens.shape).index_put((kept,), found)


def _with_draws(
    found: TopKStatistics, chosen: Tensor, labels: Tensor, draws: RefDraws, options: Options
) -> TopKStatistics:
    """Add the draws' part, from the logits (N, m + 1) of the draws and of the label."""
    chosen = scaled(chosen.to(found.logp.dtype), options.scale, options.softcap)
    log_probs = chosen[:, :-1] - chosen[:, -1:] + found.logp[:, None]
    given = found.kl, found.remainder, found.level, log_probs, found.logp, labels != IGNORE_INDEX, draws
    kl, remainder = with_draws(*given)
    return found._replace(kl=kl, remainder=remainder)


def _top_k_result(found: TopKStatistics, reference: TopKReference, shape: torch.Size) -> TopKKL:
    parts = (found.kl, found.logp, reference.label_logp, found.remainder.detach())
    return TopKKL(*(part.reshape(shape) for part in parts))
