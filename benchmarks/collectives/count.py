"""Counts the collectives of a process, and tells the plugin's from the host's; also travels into Ray's workers."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NEUTRAL = ("torch", "accelerate", "benchmarks.collectives.count", __name__, "contextlib", "functools")
"""Modules that pass a collective on for somebody else."""


class Seen(NamedTuple):
    """One collective.

    Attributes:
        operation: of ``torch.distributed``'s C++ side, such as ``allreduce_``.
        bytes: that this rank puts in.
        by: module and function that asked for it.
    """

    operation: str
    bytes: int
    by: str


def size(found: Any) -> int:
    """Bytes of all tensors in nested lists."""
    if isinstance(found, Tensor):
        return found.numel() * found.element_size()
    if isinstance(found, list | tuple):
        return sum(size(part) for part in found)
    return 0


def payload(name: str, args: Any) -> int:
    """Bytes that a rank puts into a collective; outputs, which come before inputs, are left out."""
    gathers = name.startswith(
        ("_allgather_base", "allgather", "gather", "reduce_scatter", "_reduce_scatter", "scatter")
    )
    return size(args[1] if gathers or name.startswith("alltoall") else args[0])


def asked_by() -> str:
    """Module and function of the innermost frame that is not merely passing on."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module and not module.startswith(NEUTRAL):
            return f"{module}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "nobody"


class Counter(TorchDispatchMode):
    """Within the block, every collective of this thread is noted; backward hooks in C++ are not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Seen] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            self.seen.append(Seen(name, payload(name, args), asked_by()))
        return func(*args, **(kwargs or {}))


def start(process: Any) -> None:
    """Count in this thread of a Ray worker from now on."""
    process.counter = Counter()
    process.counter.__enter__()


def stop(process: Any) -> list[tuple[str, int, str]]:
    """End the count; what was seen, as plain tuples."""
    process.counter.__exit__(None, None, None)
    return [tuple(one) for one in process.counter.seen]


def ours(seen: list[Seen]) -> list[Seen]:
    """Those that the plugin asked for."""
    return [one for one in seen if one.by.startswith("kl_plugins")]
