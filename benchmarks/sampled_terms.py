"""Measures the time that compiling the sampled terms saves per call, with eager and compiled ``kl_term`` in turns.

Run it by ``python -m benchmarks.sampled_terms``. It writes JSON and a plot into ``out/bench/sampled_terms``.
:data:`kl_plugins.kernels.backend.COMPILE_ABOVE` compares this time with the seconds that compilation takes.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.reporting import machine, write_json
from kl_plugins import KLSpec, kl_term
from kl_plugins.kernels.backend import COMPILE_ABOVE, ENVIRONMENT_VARIABLE

SPECS = ("k3@loss", "k2@loss/is:token/cap:2", "k2@loss/horizon:sequence/is:decision")
SHAPES = ((1, 1024), (8, 1024), (16, 2048), (32, 2048), (64, 2048), (64, 8192))
BACKENDS = ("eager", "compiled")


class Timing(NamedTuple):
    """Time of forward and backward pass in milliseconds: median and quartiles over the rounds."""

    median: float
    lower: float
    upper: float


def timed_call(spec: KLSpec, tensors: tuple[torch.Tensor, ...], backend: str, repeats: int) -> float:
    """Return the milliseconds of one forward and backward pass, as a mean over ``repeats`` passes."""
    os.environ[ENVIRONMENT_VARIABLE] = backend
    logp, ref_logp, old_logp, mask = tensors
    start = time.perf_counter()
    for _ in range(repeats):
        logp.grad = None
        kl_term(spec, logp, ref_logp, mask, old_logp=old_logp).loss.sum().backward()
    if logp.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3 / repeats


def measure(spec: KLSpec, shape: tuple[int, int], device: str, rounds: int) -> dict[str, Timing]:
    """Time both backends on the same tensors, alternating between them."""
    generator = torch.Generator().manual_seed(0)
    logp, ref_logp, old_logp = (-torch.rand(shape, generator=generator).to(device) for _ in range(3))
    mask = (torch.rand(shape, generator=generator) > 0.1).to(device)
    tensors = (logp.requires_grad_(), ref_logp, old_logp, mask)
    for backend in BACKENDS:  # compile and warm up
        timed_call(spec, tensors, backend, 2)
    repeats = max(1, 200_000 // logp.numel())
    times: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    for _ in range(rounds):
        for backend in BACKENDS:
            times[backend].append(timed_call(spec, tensors, backend, repeats))
    return {
        backend: Timing(statistics.median(found), *statistics.quantiles(found, n=4)[::2])
        for backend, found in times.items()
    }


def main(
    out: Annotated[Path, typer.Option(help="Folder for JSON and plot.")] = Path("out/bench/sampled_terms"),
    rounds: Annotated[int, typer.Option(min=3, help="Measurements per backend and size.")] = 15,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure, print a table, write JSON and a plot."""
    before = os.environ.get(ENVIRONMENT_VARIABLE)
    cases = [(text, shape) for text in SPECS for shape in SHAPES]
    rows = []
    for text, shape in track(cases, description="timing", console=Console(stderr=True)):
        found = measure(KLSpec.parse(text), shape, device, rounds)
        ratio = found["eager"].median / found["compiled"].median
        rows.append(
            {
                "spec": text,
                "shape": shape,
                "elements": shape[0] * shape[1],
                "speed_up_of_compiled": ratio,
                **{f"{name}_ms": timing._asdict() for name, timing in found.items()},
            }
        )
    if before is None:
        os.environ.pop(ENVIRONMENT_VARIABLE, None)
    else:
        os.environ[ENVIRONMENT_VARIABLE] = before
    table = Table("spec", "tokens", "eager ms", "compiled ms", "eager/compiled")
    for row in rows:
        eager, compiled = row["eager_ms"]["median"], row["compiled_ms"]["median"]
        table.add_row(row["spec"], str(row["elements"]), f"{eager:.3f}", f"{compiled:.3f}", f"{eager / compiled:.2f}")
    Console().print(table)
    write_json(out / "sampled_terms.json", {"machine": machine(), "compile_above": COMPILE_ABOVE, "rows": rows})
    plot(rows, out / "sampled_terms.png")


def plot(rows: list[dict], path: Path) -> None:
    """Draw the speed-up of the compiled path over the number of tokens, with one line per spec."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for text in SPECS:
        chosen = [row for row in rows if row["spec"] == text]
        axes.plot(
            [row["elements"] for row in chosen], [row["speed_up_of_compiled"] for row in chosen], marker="o", label=text
        )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.axvline(COMPILE_ABOVE, color="grey", linestyle="--", label="compiled from here on")
    axes.set(xscale="log", xlabel="tokens per call", ylabel="time eager / time compiled")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
