"""The stages as data: each is a list of steps, the most valuable first."""

from __future__ import annotations

from typing import NamedTuple


class Step(NamedTuple):
    """One command of a stage, run as ``python -m ...`` in a process of its own.

    Attributes:
        name: of its log and its entry in the stage's record.
        command: arguments of the Python interpreter; ``{out}`` and ``{device}`` are filled in.
        smoke: the same at tiny size, for a machine without a GPU.
        minutes: bound on its time.
    """

    name: str
    command: tuple[str, ...]
    smoke: tuple[str, ...]
    minutes: float


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return ("-m", f"benchmarks.{name}", "--out", "{out}", *arguments)


_KERNEL = ("kernel", "--device", "{device}", "--dtypes", "bfloat16")
_GPU_TESTS = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/core/exact")

STAGES: dict[int, tuple[Step, ...]] = {
    1: (
        Step("ceilings", _module("gpu.ceilings", "--device", "{device}"),
             _module("gpu.ceilings", "--device", "{device}", "--smoke"), 1),
        # A GPU machine has other versions than the project's tests expect, and so other warnings.
        Step("tests", (*_GPU_TESTS, "-s", "-W", "default"), (*_GPU_TESTS, "--collect-only"), 4),
        Step("kernel-logits", _module(*_KERNEL, "--only", "logits", "--rounds", "15"),
             _module(*_KERNEL, "--only", "logits", "--sizes", "smoke", "--rounds", "3"), 3),
        Step("kernel-hidden", _module(*_KERNEL, "--only", "hidden", "--rounds", "9"),
             _module(*_KERNEL, "--only", "hidden", "--sizes", "smoke", "--rounds", "3"), 3),
        Step("launches", _module("gpu.launches", "--device", "{device}"),
             _module("gpu.launches", "--device", "{device}", "--smoke"), 1),
    ),
}  # fmt: skip
