"""The Triton backend: launches of the kernels, and the choices that are made for each call."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kl_plugins.kernels.backend import BackendError, BackendStatus
from kl_plugins.kernels.exact.statistics import (
    IGNORE_INDEX,
    LabelLogits,
    Options,
    Rows,
    RowStatistics,
    Upstream,
)
from kl_plugins.kernels.exact.triton_kernels import gradient_kernel, row_sums_kernel, statistics_kernel

# BLOCK is the number of logits per step, WARPS the number of warps per program. All logits of a step are in registers.
# Larger blocks leave room for fewer programs on a multiprocessor, and still larger ones spill registers; the
# ahead-of-time tests check this. STAGES is the number of steps whose logits are loaded ahead, into shared memory. An
# H200 was fastest with these values. 16-bit logits come in many rows, whose programs hide each other's loads. 32-bit
# logits come in tiles of some 500 rows, which are too few for that. See docs/gpu.md.
FORWARD_BLOCK, FORWARD_WARPS, FORWARD_STAGES, FORWARD_STAGES_32 = 2048, 4, 1, 3
BACKWARD_BLOCK, BACKWARD_WARPS = 2048, 4
BACKWARD_BLOCK_32, BACKWARD_WARPS_32 = 4096, 8

INTERPRETED = not isinstance(row_sums_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET was set when the kernels were defined. If so, they run on the CPU, slowly."""


def status(device_type: str) -> BackendStatus:
    """Return whether the kernels run on a device, and the reason. Nothing is compiled."""
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
        shift: the shift c that was subtracted in d = z - u - c.
    """

    maximum: Tensor
    ref_maximum: Tensor
    mass: Tensor
    first: Tensor
    second: Tensor
    ref_mass: Tensor
    shift: Tensor


def forward(rows: Rows, options: Options) -> RowStatistics:
    """Compute the statistics of each row; see :func:`kl_plugins.kernels.exact.eager.forward`.

    Only a few numbers per row are computed in float64, and the host never waits for the device. So rows whose logits
    share an offset have only the precision that float32 leaves: an offset of 20 nats gives a relative error of 5e-6 in
    a KL of 5e-5.
    """
    _check_dtype(rows)
    logits, ref_logits, labels = _readable(rows)
    count, vocab = logits.shape
    found = torch.empty(4, count, dtype=torch.float32, device=logits.device)
    centre = torch.empty(count, dtype=torch.float64, device=logits.device)
    if count:
        with _on(logits):
            statistics_kernel[(count,)](
                logits,
                ref_logits,
                labels,
                found,
                centre,
                logits.stride(0),
                ref_logits.stride(0),
                count,
                vocab,
                options.scale,
                *_caps(options),
                *_flags(options),
                **_forward_shape(logits, ref_logits),
            )
    kl, logp, ref_logp, lse = found
    return RowStatistics(kl, logp, ref_logp, lse, centre)


def part_sums(rows: Rows, at_label: LabelLogits, options: Options) -> PartSums:
    """Compute the sums of one pass over the same columns of all rows, with the shift that all parts of a row share.

    Args:
        rows: logits of 16 or 32 bits. Labels are read only to find ignored rows, whose sums are 0.
        at_label: logits and shift of each row's label, which may be in other columns.
        options: options for all rows.

    Returns:
        The sums.
    """
    _check_dtype(rows)
    logits, ref_logits, labels = _readable(rows)
    count, vocab = logits.shape
    label, ref_label, shift = (part.float().contiguous() for part in at_label)
    result = torch.empty(6, count, dtype=torch.float32, device=logits.device)
    if count:
        with _on(logits):
            row_sums_kernel[(count,)](
                logits,
                ref_logits,
                labels,
                label,
                ref_label,
                shift,
                result,
                logits.stride(0),
                ref_logits.stride(0),
                count,
                vocab,
                options.scale,
                *_caps(options),
                *_flags(options),
                **_forward_shape(logits, ref_logits),
            )
    maximum, ref_maximum, mass, first, second, ref_mass = result
    shift = shift.masked_fill(labels == IGNORE_INDEX, 0.0)
    return PartSums(maximum, ref_maximum, mass, first, second, ref_mass, shift)


def backward(
    rows: Rows, statistics: RowStatistics, upstream: Upstream, options: Options, out: Tensor | None = None
) -> Tensor:
    """Compute the gradient for the policy's logits; see :func:`kl_plugins.kernels.exact.eager.backward`."""
    _check_dtype(rows)
    if out is None:
        out = torch.empty_like(rows.logits)
    logits, ref_logits, labels = _readable(rows)
    count, vocab = logits.shape
    target = out if out.stride(-1) == 1 else torch.empty(count, vocab, dtype=out.dtype, device=out.device)
    wide = logits.element_size() == 4
    largest, warps = (BACKWARD_BLOCK_32, BACKWARD_WARPS_32) if wide else (BACKWARD_BLOCK, BACKWARD_WARPS)
    block = _block(vocab, largest)
    if count:
        with _on(logits):
            gradient_kernel[(count * -(-vocab // block),)](
                logits,
                ref_logits,
                labels,
                statistics.lse,
                statistics.centre,
                upstream.kl.float().contiguous(),
                upstream.logp.float().contiguous(),
                target,
                logits.stride(0),
                ref_logits.stride(0),
                target.stride(0),
                vocab,
                options.scale,
                *_caps(options),
                torch.finfo(out.dtype).max,
                *_flags(options),
                BLOCK=block,
                num_warps=warps,
                enable_fp_fusion=True,
            )
    return out if target is out else out.copy_(target)


def _caps(options: Options) -> tuple[float, float]:
    return options.softcap or 1.0, options.ref_softcap or 1.0


def _flags(options: Options) -> tuple[bool, bool, bool, bool]:
    # The compile-time flags that scale and caps select, in the order of the kernels' signatures.
    caps = options.softcap is not None, options.ref_softcap is not None
    return options.scale != 1.0, *caps, caps[0] and options.softcap == options.ref_softcap


def _forward_shape(logits: Tensor, ref_logits: Tensor) -> dict[str, Any]:
    # The layout of a block over the threads, and the compile options for it.
    vector = 16 // max(logits.element_size(), ref_logits.element_size())  # bytes that a thread loads at once
    lanes = 32 * FORWARD_WARPS
    repeats = max(1, _block(logits.shape[1], FORWARD_BLOCK) // (lanes * vector))
    return {
        "REPEATS": repeats,
        "LANES": lanes,
        "VECTOR": vector,
        "STAGES": FORWARD_STAGES if vector == 8 else FORWARD_STAGES_32,
        "num_warps": FORWARD_WARPS,
        "enable_fp_fusion": True,  # set explicitly, because the default changes in Triton 3.10
    }


def _block(vocab: int, largest: int) -> int:
    return min(largest, max(128, 1 << (vocab - 1).bit_length()))


def _readable(rows: Rows) -> Rows:
    # The kernels assume a stride of one within a row.
    logits, ref_logits = (part if part.stride(-1) == 1 else part.contiguous() for part in rows[:2])
    return Rows(logits, ref_logits, rows.labels.contiguous())


def _on(logits: Tensor) -> AbstractContextManager[object]:
    # Triton launches on the current device. In a process with several devices, this may not be the tensor's device.
    return torch.cuda.device(logits.device) if logits.is_cuda else nullcontext()


def _check_dtype(rows: Rows) -> None:
    if torch.float64 in (rows.logits.dtype, rows.ref_logits.dtype):
        raise BackendError("the Triton kernels compute in float32; for float64 logits use the eager backend")
