"""The findings of ``kl-plugins doctor`` about the backends that can compute the KL."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from kl_plugins.hosts import Finding

if TYPE_CHECKING:
    from kl_plugins.kernels.backend import BackendStatus


def backend_findings() -> Iterator[Finding]:
    """Yield one finding per backend and device, and one per environment variable that selects a backend.

    Nothing is compiled.
    """
    try:
        import torch

        from kl_plugins.kernels import backend
    except Exception:  # the finding about torch gives the reason
        yield Finding("fault", "eager", "not available without a working torch", "install torch")
        return
    yield Finding("ok", "eager", "available")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        yield _compiled(device, *backend.backend_status(device))
    yield _triton(needed="cuda" in devices)
    yield from (_exact(device) for device in devices)
    yield from _choice(devices, backend.ENVIRONMENT_VARIABLE, backend.BACKENDS, backend.backend_status)
    yield from _exact_choice(devices)


def _compiled(device: str, usable: bool, reason: str) -> Finding:
    if usable:
        return Finding("ok", f"compiled on {device}", reason)
    remedy = (
        "install g++ to make large batches faster; the results are the same without it"
        if device == "cpu"
        else "install triton"
    )
    return Finding("warning", f"compiled on {device}", f"{reason}; the eager path is used", remedy)


def _triton(needed: bool) -> Finding:
    if importlib.util.find_spec("triton") is None:
        if needed:
            return Finding(
                "warning", "triton", "not installed, so nothing is compiled on the GPU", "pip install triton"
            )
        return Finding("absent", "triton", "not installed", "nothing to do, because there is no GPU")
    try:
        return Finding("ok", "triton", version("triton"))
    except PackageNotFoundError:
        return Finding("ok", "triton", "version unknown")


def _exact(device: str) -> Finding:
    from kl_plugins.kernels.exact.backends import EXACT_BACKENDS, exact_backend_status

    subject, usable = f"exact KL on {device}", []
    for name in EXACT_BACKENDS[1:]:
        if exact_backend_status(name, device).usable:
            usable.append(name)
    if device != "cpu" and "triton" not in usable:
        reason = exact_backend_status("triton", device).reason
        message = f"{', '.join(usable)}; the Triton kernels are not available: {reason}"
        return Finding("warning", subject, message, "pip install triton")
    return Finding("ok", subject, ", ".join(usable))


def _exact_choice(devices: list[str]) -> Iterator[Finding]:
    from kl_plugins.kernels.exact.backends import EXACT_BACKENDS, EXACT_ENVIRONMENT_VARIABLE, exact_backend_status

    asked = os.environ.get(EXACT_ENVIRONMENT_VARIABLE, "auto")
    yield from _choice(devices, EXACT_ENVIRONMENT_VARIABLE, EXACT_BACKENDS, partial(exact_backend_status, asked))


def _choice(
    devices: list[str], variable: str, known: tuple[str, ...], status: Callable[[str], BackendStatus]
) -> Iterator[Finding]:
    asked = os.environ.get(variable)
    if asked is None:
        return
    if asked not in known:
        yield Finding(
            "fault", variable, f"{asked!r} is not a backend", f"set it to one of {', '.join(known)}, or unset it"
        )
    elif asked not in ("auto", "eager") and not all(status(device).usable for device in devices):
        yield Finding("fault", variable, f"{asked} is requested, but cannot run on every device", "set it to auto")
    else:
        yield Finding("ok", variable, asked)
