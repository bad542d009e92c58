"""Exact KL from logits whose vocabulary dimension is sharded over a tensor-parallel group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from kl_plugins.exact import ExactKL
from kl_plugins.kernels.backend import BackendError
from kl_plugins.kernels.exact.arguments import check_floats, checked_labels, flat_rows, row_options
from kl_plugins.kernels.exact.sharded import Shard, sharded_logits_kl

if TYPE_CHECKING:
    from torch import Tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]
def sharded_exact_kl(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    *,
    vocab_start: int,
    group: dist.ProcessGroup | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    backend: str = "auto",
    max_tile_bytes: int | None = None,
) -> ExactKL:
    """Compute :func:`kl_plugins.exact_kl` from logits of which each rank holds some columns.

    All ranks of the group call this function together. The forward pass communicates twice: one MAX all-reduce of four
    numbers per token, and one SUM all-reduce of five numbers per token. The backward pass does not communicate.

    A row is an outlier if the log-ratio of its label is far larger than the square root of its KL.
    :func:`kl_plugins.exact_kl` computes such rows again in float64. This function does not, so its result has fewer
    correct digits there.

    Args:
        logits: (..., columns of this rank) logits of the policy, any float dtype, with their autograd graph. Ranks may
            hold different numbers of columns; policy and reference must be split at the same columns.
        ref_logits: (..., columns of this rank) logits of the reference, any float dtype.
        labels: (...) int64 token ids in the whole vocabulary, the same on every rank; -100 excludes a position.
        vocab_start: token id of this rank's first column.
        group: the tensor-parallel group; None means all ranks.
        mask: (...) True at the positions to compute, the same on every rank; None means all positions.
        temperature, softcap, ref_softcap, max_tile_bytes: as in :func:`kl_plugins.exact_kl`.
        backend: ``auto``, ``eager`` or ``triton``.

    Returns:
        kl, logp and ref_logp in nats, each of shape (...) and the same on every rank. Gradients flow to this rank's
        logits. They are correct if every rank computes the same loss from these results, as in tensor-parallel
        training.

    Raises:
        ValueError: A shape, a label or an option is invalid, or the label of a position is in the columns of no rank or
            of several ranks.
        TypeError: A tensor has an invalid dtype.
        BackendError: The requested backend is unknown or is not available here.
        RuntimeError: torch.distributed is not initialised.
    """
    check_floats(logits=logits, ref_logits=ref_logits)
    if logits.dim() < 1 or logits.shape != ref_logits.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and ref_logits {tuple(ref_logits.shape)} must be one (..., V)")
    if not logits.shape[-1] or vocab_start < 0:
        raise ValueError(f"vocab_start={vocab_start} with {logits.shape[-1]} columns: a rank must hold some tokens")
    if backend == "compiled":
        raise BackendError("backend='compiled': sharded logits are computed by the eager or the triton backend")
    if not dist.is_initialized():
        raise RuntimeError("sharded_exact_kl needs torch.distributed; for whole rows of logits use exact_kl")
    shape = logits.shape[:-1]
    rows = (flat_rows(logits), flat_rows(ref_logits.detach()), checked_labels(labels, mask, shape).reshape(-1))
    options = row_options(temperature, softcap, ref_softcap, backend, max_tile_bytes)
    kl, logp, ref_logp, *_ = sharded_logits_kl(*rows, Shard(vocab_start, group), options)
    return ExactKL(kl.reshape(shape), logp.reshape(shape), ref_logp.reshape(shape))
