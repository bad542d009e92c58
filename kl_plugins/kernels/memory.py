"""Memory in huge pages for large results on a CPU.

With pages of the usual size, the page faults of the operating system take more time than the computation. For example,
the gradient of 128 x 152064 float32 logits is computed in 13 ms (one thread of an EPYC Zen 4). Allocating and filling
its memory takes 54 ms with pages of 4 KB, and 9 ms with pages of 2 MB.
"""

from __future__ import annotations

import mmap
from functools import cache

import torch
from torch import Tensor

LARGE = 8 * 2**20
"""Smallest size in bytes for which huge pages are requested."""


def empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Do the same as ``torch.empty_like``, with huge pages for a large contiguous tensor on a CPU.

    Args:
        tensor: a tensor of any shape, strides, dtype and device.
        dtype: dtype of the result; by default that of the tensor.

    Returns:
        A tensor of the same shape and device, with undefined values.
    """
    dtype = dtype or tensor.dtype
    return _mapped(tensor.shape, dtype) if _suits(tensor, dtype) else torch.empty_like(tensor, dtype=dtype)


def zeros_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Do the same as ``torch.zeros_like``, with huge pages for a large contiguous tensor on a CPU.

    Args:
        tensor: a tensor of any shape, strides, dtype and device.
        dtype: dtype of the result; by default that of the tensor.

    Returns:
        A tensor of zeros with the same shape and device.
    """
    dtype = dtype or tensor.dtype
    # The operating system fills mapped memory with zeros.
    return _mapped(tensor.shape, dtype) if _suits(tensor, dtype) else torch.zeros_like(tensor, dtype=dtype)


def zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Do the same as ``torch.zeros``, with huge pages for a large tensor on a CPU.

    Args:
        shape: shape of the result.
        dtype: dtype of the result.
        device: device of the result.
    """
    if not _is_large(shape.numel(), dtype, device):
        return torch.zeros(shape, dtype=dtype, device=device)
    return _mapped(shape, dtype)


def _suits(tensor: Tensor, dtype: torch.dtype) -> bool:
    plain = tensor.is_contiguous() and type(tensor) in (Tensor, torch.nn.Parameter)
    return plain and _is_large(tensor.numel(), dtype, tensor.device)


def _is_large(numbers: int, dtype: torch.dtype, device: torch.device) -> bool:
    on_cpu = device.type == "cpu" and not torch.compiler.is_compiling()
    return on_cpu and numbers * dtype.itemsize >= LARGE and _huge_pages()


def _mapped(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    memory = mmap.mmap(-1, shape.numel() * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    # The storage of the tensor owns the mapping, which is released together with it.
    return torch.frombuffer(memory, dtype=dtype, count=shape.numel()).view(shape)


@cache
def _huge_pages() -> bool:
    """Return whether this system accepts the advice to use huge pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE") or not hasattr(mmap, "MAP_ANONYMOUS"):
        return False
    try:
        with mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            memory.madvise(mmap.MADV_HUGEPAGE)
    except (OSError, ValueError):
        return False
    return True
