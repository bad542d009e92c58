"""TRL's Triton kernels on a machine without a GPU: launched as kernels are, and computed by TRL's own torch code.

TRL's fused head also scores fewer rows with kernels than without, so that a trainer takes another path.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest


class Kernel:
    """Called as ``kernel[grid](...)``."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._function


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make TRL believe that Triton can be used; TRL before 1.16 has no such kernels."""
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    for name in ("forward", "backward"):
        kernel = Kernel(getattr(chunked_logprob, f"_{name}_tile"))
        monkeypatch.setattr(chunked_logprob, f"_{name}_kernel", kernel)
        monkeypatch.setattr(chunked_logprob, f"_{name}_tile", None)
    for module in (chunked_logprob, utils):
        monkeypatch.setattr(module, "_use_triton", lambda device: True)
    triton = SimpleNamespace(cdiv=lambda length, block: -(-length // block))
    monkeypatch.setattr(chunked_logprob, "triton", triton, raising=False)
