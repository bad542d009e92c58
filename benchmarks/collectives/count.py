"""A counter of the collectives of a process, by plugin and host. It is also sent by value to Ray's workers."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NEUTRAL = ("torch", "accelerate", "benchmarks.collectives.count", __name__, "contextlib", "functools")
"""Modules that start a collective only because another module called them."""


class Seen(NamedTuple):
    """One collective.

    Attributes:
        operation: name in the C++ part of ``torch.distributed``, such as ``allreduce_``.
        bytes: number of bytes that this rank contributes.
        by: module and function that requested it.
    """

    operation: str
    bytes: int
    by: str


def size(found: Any) -> int:
    """Return the bytes of all tensors in nested lists."""
    if isinstance(found, Tensor):
        return found.numel() * found.element_size()
    if isinstance(found, list | tuple):
        return sum(size(part) for part in found)
    return 0


def payload(name: str, args: Any) -> int:
    """Return the bytes that a rank contributes to a collective. Outputs, which precede inputs, are not counted."""
    gathers = name.startswith(
        ("_allgather_base", "allgather", "gather", "reduce_scatter", "_reduce_scatter", "scatter")
    )
    return size(args[1] if gathers or name.startswith("alltoall") else args[0])


def asked_by() -> str:
    """Return module and function of the innermost frame that is not in one of the :data:`NEUTRAL` modules."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module and not module.startswith(NEUTRAL):
            return f"{module}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "nobody"


class Counter(TorchDispatchMode):
    """A mode that records every collective of this thread within the block, except those of backward hooks in C++."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Seen] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            self.seen.append(Seen(name, payload(name, args), asked_by()))
        return func(*args, **(kwargs or {}))


def start(process: Any) -> None:
    """Start the count in this thread of a Ray worker."""
    process.counter = Counter()
    process.counter.__enter__()


def stop(process: Any) -> list[tuple[str, int, str]]:
    """End the count, and return the recorded collectives as plain tuples."""
    process.counter.__exit__(None, None, None)
    return [tuple(one) for one in process.counter.seen]


def ours(seen: list[Seen]) -> list[Seen]:
    """Return the collectives that the plugin requested."""
    return [one for one in seen if one.by.startswith("kl_plugins")]
