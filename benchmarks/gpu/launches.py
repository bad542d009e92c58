"""Measures time and number of kernel launches of sampled KL terms, forward and backward, for several specs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.gpu.ceilings import median_seconds
from benchmarks.reporting import machine, write_json
from kl_plugins import KLSpec, kl_term
from kl_plugins.kernels.backend import ENVIRONMENT_VARIABLE

SPECS = ("k3@loss", "k2@loss/is:token", "k2@loss/is:token/floor:0.5", "k2@loss/horizon:sequence/is:decision")
BACKENDS = ("eager", "compiled")
SHAPE, SMOKE_SHAPE = (64, 8192), (4, 64)


def main(
    out: Annotated[Path, typer.Option(help="Folder of launches.json.")] = Path("out/bench/gpu"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    smoke: Annotated[bool, typer.Option(help="Tiny sizes, eager only.")] = False,
) -> None:
    """Measure each spec on each backend, and for comparison k3 as frameworks write it."""
    shape = SMOKE_SHAPE if smoke else SHAPE
    rows = []
    for backend in BACKENDS[:1] if smoke else BACKENDS:
        for spec in SPECS:
            rows.append(measured(spec, backend, term_of(spec, backend, shape, device), device))
            print(
                "{spec:40s} {backend:9s} {launches:4d} launches  {milliseconds:.3f} ms".format(**rows[-1]), flush=True
            )
    rows.append(measured("k3 by hand", "eager", by_hand(shape, device), device))
    print("{spec:40s} {backend:9s} {launches:4d} launches  {milliseconds:.3f} ms".format(**rows[-1]), flush=True)
    write_json(out / "launches.json", {"machine": machine(), "shape": shape, "rows": rows})


def measured(spec: str, backend: str, call: Callable[[], object], device: str) -> dict[str, Any]:
    """Return a row with the spec, the backend, the launches of one call, and its median time in milliseconds."""
    milliseconds = 1e3 * median_seconds(call, device, rounds=20)
    return {"spec": spec, "backend": backend, "launches": launches(call, device), "milliseconds": milliseconds}


def term_of(spec: str, backend: str, shape: tuple[int, int], device: str) -> Callable[[], object]:
    """Return a function that computes the term of a batch under a spec, its metrics and its gradient."""
    parsed = KLSpec.parse(spec)
    logp, ref_logp, old_logp, mask = batch(shape, device)

    def call() -> None:
        os.environ[ENVIRONMENT_VARIABLE] = backend
        logp.grad = None
        kl_term(parsed, logp, ref_logp, mask, old_logp=old_logp).loss.sum().backward()

    return call


def by_hand(shape: tuple[int, int], device: str) -> Callable[[], object]:
    """Return a function that computes the k3 of GRPO and its gradient, as frameworks write it."""
    logp, ref_logp, _, mask = batch(shape, device)

    def call() -> None:
        logp.grad = None
        delta = ref_logp - logp
        ((delta.exp() - delta - 1) * mask).sum().backward()

    return call


def batch(shape: tuple[int, int], device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log-probs of policy, reference and sampler (nats), and the mask, all of shape (B, T)."""
    generator = torch.Generator().manual_seed(0)
    logp, ref_logp, old_logp = (-torch.rand(shape, generator=generator).to(device) for _ in range(3))
    mask = (torch.rand(shape, generator=generator) > 0.1).to(device)
    return logp.requires_grad_(), ref_logp, old_logp, mask


def launches(call: Callable[[], object], device: str) -> int:
    """Return the number of kernels that one call starts on a GPU, or of operators that it runs on a CPU."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    kind = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    with profile(activities=[activity]) as found:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    return sum(1 for event in found.events() if event.device_type == kind)


if __name__ == "__main__":
    typer.run(main)
