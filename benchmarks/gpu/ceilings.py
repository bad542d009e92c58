"""Measures how fast a device copies memory and multiplies matrices, as upper limits for the speed of the kernels."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.reporting import machine, write_json


def main(
    out: Annotated[Path, typer.Option(help="Folder of ceilings.json.")] = Path("out/bench/gpu"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    smoke: Annotated[bool, typer.Option(help="Tiny sizes.")] = False,
) -> None:
    """Measure both rates and print them."""
    found = ceilings(device, smoke=smoke)
    write_json(out / "ceilings.json", {"machine": machine(), **found})
    print(f"copy {found['copy_bytes_per_second'] / 1e12:.2f} TB/s (bytes read and written), "
          f"bf16 products {found['product_flop_per_second'] / 1e12:.0f} TFLOP/s")  # fmt: skip


def ceilings(device: str, *, smoke: bool) -> dict[str, Any]:
    """Measure the rates as medians over ten rounds.

    Args:
        device: cpu or cuda.
        smoke: tiny sizes.

    Returns:
        ``copy_bytes_per_second`` (bytes read plus bytes written) and ``product_flop_per_second`` (bfloat16 operands).
    """
    elements, width = (2**16, 128) if smoke else (2**31, 8192)
    copied = copy_seconds(elements, device)
    left, right = (torch.randn(width, width, device=device).bfloat16() for _ in range(2))
    multiplied = median_seconds(lambda: left @ right, device)
    return {
        "copy_bytes_per_second": 2 * 2 * elements / copied,
        "product_flop_per_second": 2 * width**3 / multiplied,
        "copied_elements": elements,
        "product_width": width,
    }


def copy_seconds(elements: int, device: str) -> float:
    """Return the seconds that copying this number of bfloat16 elements within the same memory takes."""
    source = torch.randn(2**16, device=device).to(torch.bfloat16).repeat(elements // 2**16)
    target = torch.empty_like(source)
    return median_seconds(lambda: target.copy_(source), device)


def median_seconds(call: Any, device: str, rounds: int = 10) -> float:
    """Return the median seconds of a call after three warm-up calls; the device is idle before and after each call."""
    times = []
    for index in range(rounds + 3):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        if index >= 3:
            times.append(time.perf_counter() - start)
    return sorted(times)[rounds // 2]


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    typer.run(main)
