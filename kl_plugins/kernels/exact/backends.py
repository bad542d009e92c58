"""Choice of the backend that computes a row's statistics and gradient: by device and size, or by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kl_plugins.kernels.backend import (
    COMPILE_ABOVE,
    BackendError,
    BackendStatus,
    asked_by_environment,
    backend_status,
    say_once,
)
from kl_plugins.kernels.exact.statistics import Options, RowStatistics

EXACT_BACKENDS = ("auto", "eager", "compiled", "triton")
EXACT_ENVIRONMENT_VARIABLE = "KL_PLUGINS_EXACT_BACKEND"


class ExactBackend(NamedTuple):
    """A backend: its name and two functions, which are documented in :mod:`kl_plugins.kernels.exact.eager`."""

    name: str
    forward: Callable[..., RowStatistics]
    backward: Callable[..., Tensor]


def exact_backend_status(name: str, device_type: str = "cpu") -> BackendStatus:
    """Return whether a backend can be used on a device, and the reason. Nothing is compiled.

    Args:
        name: ``eager``, ``compiled`` or ``triton``.
        device_type: ``cpu``, ``cuda``, ...
    """
    if name == "eager":
        return BackendStatus(True, "plain torch operations")
    if name == "compiled":
        return backend_status(device_type)
    try:
        module = importlib.import_module("kl_plugins.kernels.exact.triton_backend")
    except ImportError as error:
        return BackendStatus(False, f"the triton package cannot be imported ({error})")
    status: BackendStatus = module.status(device_type)
    return status


def backend_for(logits: Tensor, options: Options) -> ExactBackend:
    """Return the :func:`exact_backend` that the options of a call ask for."""
    return exact_backend(options.backend, logits)


def exact_backend(asked: str, logits: Tensor) -> ExactBackend:
    """Return the backend for the given logits.

    Args:
        asked: one of :data:`EXACT_BACKENDS`. With ``auto`` the environment variable decides, and if it is not set,
            device and size decide.
        logits: (N, V) policy logits; only device, dtype and size are used.

    Returns:
        The backend.

    Raises:
        BackendError: if the name is unknown, or the backend cannot be used on this device.
    """
    if asked not in EXACT_BACKENDS:
        raise BackendError(f"backend={asked!r}: expected one of {', '.join(EXACT_BACKENDS)}")
    source = f"backend={asked!r}"
    if asked == "auto":
        asked = asked_by_environment(EXACT_ENVIRONMENT_VARIABLE, EXACT_BACKENDS)
        source = f"{EXACT_ENVIRONMENT_VARIABLE}={asked}"
    device = logits.device.type
    if asked == "auto":
        return _load(_automatic(logits.numel(), logits.dtype, device), forced=False)
    status = exact_backend_status(asked, device)
    if not status.usable:
        raise BackendError(f"{source} on {device}: {status.reason}. Install it, or use auto.")
    return _load(asked, forced=True)


def _automatic(elements: int, dtype: torch.dtype, device: str) -> str:
    if dtype == torch.float64 or torch.compiler.is_compiling():
        return "eager"
    if device == "cuda" and exact_backend_status("triton", device).usable:
        return "triton"
    if elements < COMPILE_ABOVE:
        return "eager"
    status = backend_status(device)
    if status.usable:
        return "compiled"
    say_once(f"kl-plugins: eager path for exact KL on {device}: {status.reason}; results are the same, slower")
    return "eager"


def _load(name: str, *, forced: bool) -> ExactBackend:
    # A backend is imported only when it is chosen, because Triton is optional and does work at import time.
    if name == "eager":
        from kl_plugins.kernels.exact import eager

        return ExactBackend(name, eager.forward, eager.backward)
    if name == "compiled":
        from kl_plugins.kernels.exact import compiled

        return ExactBackend(name, partial(compiled.forward, forced=forced), partial(compiled.backward, forced=forced))
    module = importlib.import_module("kl_plugins.kernels.exact.triton_backend")
    return ExactBackend(name, module.forward, module.backward)
