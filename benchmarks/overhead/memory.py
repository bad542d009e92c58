"""Memory of the process that trains. These functions are also sent by value to Ray's workers."""

from __future__ import annotations

from typing import Any


def restart(process: Any = None) -> int:
    """Release freed memory, reset the peak, and return the bytes in use."""
    import ctypes
    import gc
    from pathlib import Path

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return size()


def size(process: Any = None) -> int:
    """Return the bytes in use."""
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS")


def peak(process: Any = None) -> int:
    """Return the most bytes in use since :func:`restart`: of the GPU's allocator, else resident memory in Linux."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(field: str) -> int:
    from pathlib import Path

    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1]) * 1024
