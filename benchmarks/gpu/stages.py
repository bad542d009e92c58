"""The stages as data; each is a list of steps, with the most important ones first."""

from __future__ import annotations

from typing import NamedTuple

STAGE_MINUTES = 8.0
"""Time limit of a stage in minutes. Calls to a GPU machine often have a limit of ten minutes."""


class Step(NamedTuple):
    """One command of a stage, which runs in a separate process.

    Attributes:
        name: name of its log and of its entry in the stage's record.
        command: arguments of the Python interpreter; ``{out}`` and ``{device}`` are filled in.
        smoke: the arguments for a tiny size, for a machine without a GPU.
        minutes: time limit of the command; a smoke run only has that of its stage.
        goes_on: whether the command continues its earlier work; it is then started again even if it succeeded before.
    """

    name: str
    command: tuple[str, ...]
    smoke: tuple[str, ...]
    minutes: float
    goes_on: bool = False


def _module(name: str, *arguments: str, folder: str = "{out}") -> tuple[str, ...]:
    return ("-m", f"benchmarks.{name}", "--out", folder, *arguments)


_DEVICE = ("--device", "{device}")
_KERNEL = ("kernel", *_DEVICE, "--dtypes", "bfloat16")
_GPU_TESTS = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/core/exact")
_DEMO = ("demo_llm", *_DEVICE)
_STEPS = ("llm.trl_steps", *_DEVICE)
_LARGE = ("--large-vocabulary", "--arms", "trl,k2@loss,exact@loss/top,exact@loss")
_SHARDED = ("llm.sharded", *_DEVICE)
_STALE = ("llm.staleness", *_DEVICE)
_TWO_ARMS = ("--arms", "none,default")

STAGES: dict[int, tuple[Step, ...]] = {
    # Kernels and tests; needs no model.
    1: (
        Step("ceilings", _module("gpu.ceilings", *_DEVICE), _module("gpu.ceilings", *_DEVICE, "--smoke"), 1),
        # A GPU machine has other versions than the project's tests expect, and so other warnings.
        Step("tests", (*_GPU_TESTS, "-s", "-W", "default"), (*_GPU_TESTS, "--collect-only", "-W", "default"), 4),
        Step("kernel-logits", _module(*_KERNEL, "--only", "logits", "--rounds", "15"),
             _module(*_KERNEL, "--only", "logits", "--sizes", "smoke", "--rounds", "3"), 3),
        Step("kernel-hidden", _module(*_KERNEL, "--only", "hidden", "--rounds", "9"),
             _module(*_KERNEL, "--only", "hidden", "--sizes", "smoke", "--rounds", "3"), 3),
        Step("launches", _module("gpu.launches", *_DEVICE), _module("gpu.launches", *_DEVICE, "--smoke"), 1),
    ),
    # A real language model in TRL: what each regulariser does to it, what a step costs, and sharded training.
    2: (
        Step("demo-llm", _module(*_DEMO, folder="{out}/demo-llm"),
             _module(*_DEMO, "--smoke", *_TWO_ARMS, "--steps", "2", folder="{out}/demo-llm"), 3),
        Step("trl-steps", _module(*_STEPS, "--minutes", "1.8", folder="{out}/trl-steps"),
             _module(*_STEPS, "--smoke", "--arms", "none,trl,default,exact@loss/top", folder="{out}/trl-steps"), 2.2),
        Step("sharded", _module(*_SHARDED, "--minutes", "1.5", folder="{out}/sharded"),
             _module(*_SHARDED, "--smoke", "--arms", "k2@loss,exact@loss,k1@advantage", folder="{out}/sharded"), 1.6),
        Step("trl-steps-vocabulary",
             _module(*_STEPS, *_LARGE, "--minutes", "0.9", folder="{out}/trl-steps-vocabulary"),
             _module(*_STEPS, *_LARGE, "--smoke", folder="{out}/trl-steps-vocabulary"), 1.2),
    ),
    # Stage 3 trains the same model on stale data. Two groups of runs fit into one call; a second call continues.
    3: (
        Step("staleness", _module(*_STALE, "--minutes", "7.4", folder="{out}/staleness"),
             _module(*_STALE, "--smoke", *_TWO_ARMS, "--delays", "1,0", "--seeds", "1", folder="{out}/staleness"),
             STAGE_MINUTES, goes_on=True),
    ),
}  # fmt: skip
