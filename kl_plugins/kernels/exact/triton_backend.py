"""The Triton backend: launches, and what of them is decided per call."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kl_plugins.kernels.backend import BackendError, BackendStatus
from kl_plugins.kernels.exact.statistics import (
    IGNORE_INDEX,
    LabelLogits,
    Options,
    RowStatistics,
    RowSums,
    finish,
    label_logits,
)
from kl_plugins.kernels.exact.triton_kernels import gradient_kernel, row_sums_kernel

# Tokens per step, and warps per program. Forward keeps four sums per lane: larger blocks leave room for fewer programs
# on a multiprocessor, and spill in the end, which the ahead-of-time tests watch.
FORWARD_BLOCK, FORWARD_WARPS = 1024, 4
BACKWARD_BLOCK, BACKWARD_WARPS = 4096, 8

INTERPRETED = not isinstance(row_sums_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET was set when the kernels were defined: they then run on the CPU, slowly."""


def status(device_type: str) -> BackendStatus:
    """Whether the kernels run on a device, and why; nothing is compiled."""
    if INTERPRETED:
        return BackendStatus(True, f"triton {triton.__version__}, interpreted (TRITON_INTERPRET)")
    if device_type != "cuda":
        return BackendStatus(False, f"the Triton kernels run on CUDA devices, not on {device_type}")
    if not torch.cuda.is_available():
        return BackendStatus(False, "no CUDA device is visible to this process")
    return BackendStatus(True, f"triton {triton.__version__}")


class PartSums(NamedTuple):
    """Sums over a part of each row's vocabulary, all (N,) float32.

    Attributes:
        maximum, ref_maximum: the largest soft-capped logits, before the temperature, the label's own included.
        mass: sum of exp(z - max z).
        first, second: as in :class:`~kl_plugins.kernels.exact.statistics.RowSums`.
        ref_mass: sum of exp(u - max u).
        shift: what d was taken around.
    """

    maximum: Tensor
    ref_maximum: Tensor
    mass: Tensor
    first: Tensor
    second: Tensor
    ref_mass: Tensor
    shift: Tensor


def forward(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    *,
    scale: float,
    softcap: float | None,
    ref_softcap: float | None,
) -> RowStatistics:
    """Statistics of each row; see :func:`kl_plugins.kernels.exact.eager.forward`.

    Nothing is computed in float64 but a few numbers per row, and the host never waits for the device. So rows whose
    logits have an offset in common keep the digits that float32 leaves: 20 nats of it cost 5e-6 of a KL of 5e-5.
    """
    options = Options(scale, softcap, ref_softcap)
    at_label = label_logits(logits, ref_logits, labels, options)
    sums = part_sums(logits, ref_logits, labels, at_label, options, shift_again=True)
    whole = RowSums(sums.maximum.double() * scale, *sums[2:], *at_label[:2])
    ref_lse = sums.ref_maximum.double() * scale + sums.ref_mass.double().log() + sums.shift.double()
    # What the kernel passed again is no longer doubtful, and ref_lse cannot overflow.
    return finish(whole, labels, torch.float32, ref_lse)[0]


def part_sums(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    at_label: LabelLogits,
    options: Options,
    *,
    shift_again: bool = False,
) -> PartSums:
    """One pass over rows, or over the same columns of all rows.

    Args:
        logits, ref_logits: (N, V), 16 or 32 bits; policy and reference.
        labels: (N,) int64, read for :data:`~kl_plugins.kernels.exact.statistics.IGNORE_INDEX` only: such rows hold 0.
        at_label: of each row's label, which may be in other columns.
        options: for all rows.
        shift_again: pass rows whose label is an outlier once more, around E_p[z - u]. Parts of one row must not: they
            have to share their shift.

    Returns:
        The sums.
    """
    _check_dtype(logits, ref_logits)
    rows, vocab = logits.shape
    logits, ref_logits = _unit_stride(logits), _unit_stride(ref_logits)
    result = torch.zeros(len(PartSums._fields), rows, dtype=torch.float32, device=logits.device)
    if rows:
        with _on(logits):
            row_sums_kernel[(rows,)](
                logits,
                ref_logits,
                labels != IGNORE_INDEX,
                *(part.float().contiguous() for part in at_label),
                result,
                logits.stride(0),
                ref_logits.stride(0),
                rows,
                vocab,
                options.scale,
                *_caps(options.softcap, options.ref_softcap),
                PASSES=2 if shift_again else 1,
                BLOCK=_block(vocab, FORWARD_BLOCK),
                num_warps=FORWARD_WARPS,
                enable_fp_fusion=True,  # said aloud: the default changes in Triton 3.10
            )
    return PartSums(*result)


def backward(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    statistics: RowStatistics,
    grad_kl: Tensor,
    grad_logp: Tensor,
    *,
    scale: float,
    softcap: float | None,
    ref_softcap: float | None,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient with respect to the policy's logits; see :func:`kl_plugins.kernels.exact.eager.backward`."""
    _check_dtype(logits, ref_logits)
    rows, vocab = logits.shape
    if out is None:
        out = torch.empty_like(logits)
    target = out if out.stride(-1) == 1 else torch.empty(rows, vocab, dtype=out.dtype, device=out.device)
    logits, ref_logits = _unit_stride(logits), _unit_stride(ref_logits)
    block = _block(vocab, BACKWARD_BLOCK)
    if rows:
        with _on(logits):
            gradient_kernel[(rows * -(-vocab // block),)](
                logits,
                ref_logits,
                labels != IGNORE_INDEX,
                labels,
                statistics.lse,
                statistics.centre.float(),
                grad_kl.float().contiguous(),
                grad_logp.float().contiguous(),
                target,
                logits.stride(0),
                ref_logits.stride(0),
                target.stride(0),
                vocab,
                scale,
                *_caps(softcap, ref_softcap, torch.finfo(out.dtype).max),
                BLOCK=block,
                num_warps=BACKWARD_WARPS,
                enable_fp_fusion=True,
            )
    return out if target is out else out.copy_(target)


def _caps(softcap: float | None, ref_softcap: float | None, *between: float) -> tuple[float | bool, ...]:
    # What stands in the signatures of both kernels: values, then which code they select.
    same = softcap is not None and softcap == ref_softcap
    return (softcap or 1.0, ref_softcap or 1.0, *between, softcap is not None, ref_softcap is not None, same)


def _block(vocab: int, largest: int) -> int:
    return min(largest, max(128, 1 << (vocab - 1).bit_length()))


def _unit_stride(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def _on(logits: Tensor) -> AbstractContextManager[object]:
    # Triton launches on the current device, which in a process with several need not be the tensor's.
    return torch.cuda.device(logits.device) if logits.is_cuda else nullcontext()


def _check_dtype(*tensors: Tensor) -> None:
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        raise BackendError("the Triton kernels compute in float32; for float64 logits use the eager backend")
