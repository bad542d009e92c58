"""Choice between the eager and the compiled path, and what the exact kernels' backends have in common with it."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "eager", "compiled")
ENVIRONMENT_VARIABLE = "KL_PLUGINS_BACKEND"

COMPILE_ABOVE = 65_536
"""Elements per call from which the terms are compiled.

``python -m benchmarks.sampled_terms`` finds the compiled path no slower at any size on a CPU, but below this it saves a
few milliseconds a call, which short runs do not earn back: compiling takes seconds, in every process.
"""


RECOMPILE_LIMIT = 64


class BackendStatus(NamedTuple):
    """Whether the compiled path (or another backend) can be used on a device, and why."""

    compiled: bool
    reason: str

    @property
    def usable(self) -> bool:
        """``compiled``, for backends of other names."""
        return self.compiled


class BackendError(RuntimeError):
    """A backend was asked for by name and is not there."""


@cache
def backend_status(device_type: str = "cpu") -> BackendStatus:
    """Look for what ``torch.compile`` needs on a device, without compiling anything."""
    if device_type == "cpu":
        asked = os.environ.get("CXX")
        found = shutil.which(asked) if asked else shutil.which("g++") or shutil.which("clang++")
        if found is None:
            return BackendStatus(False, f"no C++ compiler found (looked for {asked or 'g++ and clang++'})")
        return BackendStatus(True, f"C++ compiler {os.path.basename(found)}")
    if importlib.util.find_spec("triton") is None:
        return BackendStatus(False, f"the triton package, which compiles for {device_type}, is not installed")
    return BackendStatus(True, "triton")


def asked_by_environment(variable: str, known: tuple[str, ...]) -> str:
    """The backend that an environment variable names, ``auto`` where it is not set.

    Raises:
        BackendError: it names an unknown one.
    """
    asked = os.environ.get(variable, "auto")
    if asked not in known:
        raise BackendError(f"{variable}={asked!r}: expected one of {', '.join(known)}")
    return asked


def chosen_backend(elements: int, device_type: str) -> str:
    """``eager`` or ``compiled`` for a call of this size.

    Args:
        elements: number of tokens, padding included.
        device_type: ``cpu``, ``cuda``, ...

    Returns:
        The backend's name.

    Raises:
        BackendError: the environment variable names an unknown backend, or ``compiled`` where it cannot run.
    """
    asked = asked_by_environment(ENVIRONMENT_VARIABLE, BACKENDS)
    if asked == "eager" or torch.compiler.is_compiling():  # an outer torch.compile inlines the eager code
        return "eager"
    if asked == "auto" and elements < COMPILE_ABOVE:
        return "eager"
    status = backend_status(device_type)
    if status.compiled:
        return "compiled"
    if asked == "compiled":
        raise BackendError(
            f"{ENVIRONMENT_VARIABLE}=compiled on {device_type}: {status.reason}. Install it, or use auto."
        )
    say_once(f"kl-plugins: eager path on {device_type}: {status.reason}; results are the same, large batches slower")
    return "eager"


@cache
def say_once(message: str) -> None:
    """Log a warning the first time that it is given in this process."""
    logger.warning(message)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=True)


_failed: set[Callable[..., Any]] = set()


def run(function: Callable[..., Any], *args: Any, like: Tensor) -> Any:
    """Call a pure tensor function on the backend that suits the size of ``like``.

    A compiler that is present but broken costs one warning and the eager path, never the run.
    """
    if chosen_backend(like.numel(), like.device.type) == "eager":
        return function(*args)
    return run_compiled(function, *args, forced=os.environ.get(ENVIRONMENT_VARIABLE) == "compiled")


def run_compiled(
    function: Callable[..., Any], *args: Any, forced: bool, instead: Callable[..., Any] | None = None
) -> Any:
    """Call a tensor function compiled, or ``instead`` (default: the function itself) where compiling it fails.

    Args:
        function: compiled once per process and kept.
        forced: let the compiler's error out instead.
    """
    instead = instead or function
    if function in _failed and not forced:
        return instead(*args)
    try:
        # One program per dtype and per kind of option; a process that uses many is not at fault.
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            return _compiled(function)(*args)
    except RuntimeError as error:  # dynamo's and inductor's errors derive from it
        if forced:
            raise
        _failed.add(function)  # trying again would cost seconds at every step
        say_once(f"kl-plugins: eager path: torch.compile failed ({type(error).__name__}: {str(error)[:300]})")
        return instead(*args)
