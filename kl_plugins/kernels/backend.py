"""Choice between eager and compiled computation of the sampled terms, and functions that the exact kernels share."""

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
"""Number of elements in a call from which on the ``auto`` backend compiles the terms.

On a CPU, ``python -m benchmarks.sampled_terms`` finds that compiled code is not slower at any size. Below this number
it saves only a few milliseconds per call, while compilation takes seconds in every process, so short runs would lose
time.
"""

RECOMPILE_LIMIT = 64
"""Number of versions of one function that torch may compile in a process."""


class BackendStatus(NamedTuple):
    """Availability of a backend on a device.

    Attributes:
        compiled: whether the compiled path, or another backend, can be used.
        reason: why it can or cannot be used.
    """

    compiled: bool
    reason: str

    @property
    def usable(self) -> bool:
        """The same as ``compiled``; a clearer name for backends other than the compiled path."""
        return self.compiled


class BackendError(RuntimeError):
    """A requested backend is unknown or not available."""


@cache
def backend_status(device_type: str = "cpu") -> BackendStatus:
    """Check whether ``torch.compile`` has the compiler that it needs on a device, without compiling anything.

    Args:
        device_type: ``cpu``, ``cuda``, ...

    Returns:
        Whether code can be compiled, and the reason.
    """
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
    """Return the backend that an environment variable names, or ``auto`` if the variable is not set.

    Args:
        variable: name of the environment variable.
        known: the valid values.

    Raises:
        BackendError: The variable names an unknown backend.
    """
    asked = os.environ.get(variable, "auto")
    if asked not in known:
        raise BackendError(f"{variable}={asked!r}: expected one of {', '.join(known)}")
    return asked


def chosen_backend(elements: int, device_type: str) -> str:
    """Choose the backend for one call.

    Args:
        elements: number of tokens in the call, including padding.
        device_type: ``cpu``, ``cuda``, ...

    Returns:
        ``eager`` or ``compiled``.

    Raises:
        BackendError: The environment variable names an unknown backend, or it names ``compiled`` and nothing can be
            compiled on this device.
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
    say_once(
        f"kl-plugins: eager path on {device_type}: {status.reason}; the results are the same, but large batches are "
        "slower"
    )
    return "eager"


@cache
def say_once(message: str) -> None:
    """Log a warning once per process; later calls with the same text do nothing."""
    logger.warning(message)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=True)


_failed: set[Callable[..., Any]] = set()


def run(function: Callable[..., Any], *args: Any, like: Tensor) -> Any:
    """Call a pure tensor function on the backend that suits the size and the device of ``like``.

    If the compiler is present but fails, the call logs one warning and uses the eager path, so that the run continues.

    Args:
        function: the function to call.
        args: its arguments.
        like: tensor whose number of elements and device determine the backend.

    Returns:
        The result of the function.

    Raises:
        BackendError: The environment variable names a backend that is unknown or not available here.
    """
    if chosen_backend(like.numel(), like.device.type) == "eager":
        return function(*args)
    return run_compiled(function, *args, forced=os.environ.get(ENVIRONMENT_VARIABLE) == "compiled")


def run_compiled(
    function: Callable[..., Any], *args: Any, forced: bool, instead: Callable[..., Any] | None = None
) -> Any:
    """Call the compiled form of a tensor function, or call ``instead`` if compilation fails.

    Args:
        function: the function; its compiled form is kept for later calls.
        args: its arguments.
        forced: whether to raise the compiler's error instead of calling ``instead``.
        instead: the function to call if compilation fails; by default ``function`` itself, not compiled.

    Returns:
        The result of the function that was called.

    Raises:
        RuntimeError: Compilation failed and ``forced`` is true.
    """
    instead = instead or function
    if function in _failed and not forced:
        return instead(*args)
    try:
        # Each dtype and each kind of option needs its own program. torch's default limit is too low for that.
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            return _compiled(function)(*args)
    except RuntimeError as error:  # the base class of the errors of dynamo and inductor
        if forced:
            raise
        _failed.add(function)  # a new attempt would cost seconds at every step
        say_once(f"kl-plugins: eager path: torch.compile failed ({type(error).__name__}: {str(error)[:300]})")
        return instead(*args)
