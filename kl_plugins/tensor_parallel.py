"""Exact KL where the vocabulary is sharded over a tensor-parallel group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from kl_plugins.exact import ExactKL, _check_floats, _labels, _options, _rows
from kl_plugins.kernels.backend import BackendError
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
    """:func:`kl_plugins.exact_kl` of logits of which each rank holds some columns; called by all ranks of the group.

    Communication is one MAX all-reduce of four numbers per token and one SUM all-reduce of five in the forward pass,
    none in the backward pass. Rows whose label is an outlier (its log-ratio far beyond the square root of the KL) are
    not computed again in float64, as :func:`kl_plugins.exact_kl` does, but keep what digits one pass leaves.

    Args:
        logits: (..., columns of this rank) of the policy, any float dtype, with their graph. Ranks may hold different
            numbers of columns; policy and reference are cut alike.
        ref_logits: the same columns of the reference.
        labels: (...) int64 tokens of the whole vocabulary, the same on every rank; -100 leaves a position out.
        vocab_start: token of this rank's first column.
        group: the tensor-parallel group; None for all ranks.
        mask: (...) True where a position counts, the same on every rank.
        temperature, softcap, ref_softcap, max_tile_bytes: as in :func:`kl_plugins.exact_kl`.
        backend: ``auto``, ``eager`` or ``triton``.

    Returns:
        kl, logp, ref_logp, each (...), the same on every rank. Gradients reach this rank's logits, and are right where
        every rank computes the same loss of them, as in tensor-parallel training.

    Raises:
        ValueError: a shape, label or option that cannot be, or a label that no rank holds, or several.
        TypeError: a dtype that cannot be.
        BackendError: the backend asked for is unknown or cannot be used here.
        RuntimeError: torch.distributed is not initialised.
    """
    _check_floats(logits=logits, ref_logits=ref_logits)
    if logits.dim() < 1 or logits.shape != ref_logits.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and ref_logits {tuple(ref_logits.shape)} must be one (..., V)")
    if not logits.shape[-1] or vocab_start < 0:
        raise ValueError(f"vocab_start={vocab_start} with {logits.shape[-1]} columns: a rank must hold some tokens")
    if backend == "compiled":
        raise BackendError("backend='compiled': sharded logits are computed by the eager or the triton backend")
    if not dist.is_initialized():
        raise RuntimeError("sharded_exact_kl needs torch.distributed; for whole rows of logits use exact_kl")
    shape = logits.shape[:-1]
    rows = (_rows(logits), _rows(ref_logits.detach()), _labels(labels, mask, shape).reshape(-1))
    options = _options(temperature, softcap, ref_softcap, backend, max_tile_bytes)
    kl, logp, ref_logp, *_ = sharded_logits_kl(*rows, Shard(vocab_start, group), options)
    return ExactKL(kl.reshape(shape), logp.reshape(shape), ref_logp.reshape(shape))
