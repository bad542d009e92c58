"""Measures time and peak memory of forward and backward pass, with all contestants in turns."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernel.contestants import Contestant
from benchmarks.kernel.problems import Problem

FEWEST, LONG = 3, 2.0
"""Number of timed passes if a pass is long, and the number of seconds from which on it is long."""


def once(contestant: Contestant, problem: Problem) -> None:
    """Run one forward and backward pass; the gradients are kept."""
    problem.clear()
    contestant.loss(problem).backward()
    if problem.policy.is_cuda:
        torch.cuda.synchronize()


def seconds(contestant: Contestant, problem: Problem) -> tuple[float, float]:
    """Return wall-clock time and CPU time of one pass; other work on the machine changes the CPU time less."""
    start, cpu = time.perf_counter(), time.process_time()
    once(contestant, problem)
    return time.perf_counter() - start, time.process_time() - cpu


def transient_bytes(contestant: Contestant, problem: Problem) -> int:
    """Return the peak memory that one pass needs in addition, including the gradients of policy and head, in bytes.

    On a GPU this is the peak of the allocator. On a CPU it is the peak of the resident memory of the process, as Linux
    counts it.
    """
    problem.clear()
    gc.collect()
    if problem.policy.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(contestant, problem)
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    once(contestant, problem)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line for line in lines if line.startswith(field + ":")).split()[1]
    return int(kilobytes) * 1024


def compare(
    contestants: Sequence[Contestant], problem: Problem, rounds: int, progress: Callable[[], None]
) -> list[dict[str, Any]]:
    """Measure all contestants in turns: in each round every contestant runs once.

    Args:
        contestants: the contestants.
        problem: the problem that all of them get.
        rounds: number of timed passes of each, after two warm-up passes; :data:`FEWEST` if a pass is long.
        progress: function that is called after each pass.

    Returns:
        One row per contestant, with median and quartiles of its times, and with its memory. Ratios are computed
        against the first contestant in each round, so that changes of the machine's speed between rounds cancel.
    """
    slowest = 0.0
    for contestant in contestants:
        once(contestant, problem)
        slowest = max(slowest, seconds(contestant, problem)[0])
        progress()
    rounds = min(rounds, FEWEST) if slowest > LONG else rounds
    times: list[list[tuple[float, float]]] = [[] for _ in contestants]
    for _ in range(rounds):
        for found, contestant in zip(times, contestants, strict=True):
            found.append(seconds(contestant, problem))
            progress()
    gradient_bytes = sum(t.numel() * t.element_size() for t in (problem.policy, problem.weight) if t is not None)
    rows = []
    firsts = list(zip(*times[0], strict=True))
    for found, contestant in zip(times, contestants, strict=True):
        wall, cpu = zip(*found, strict=True)
        peak = max(transient_bytes(contestant, problem) for _ in range(1 if slowest > LONG else 2))
        rows.append(
            {
                "contestant": contestant.name,
                "kind": contestant.kind,
                "ours": contestant.ours,
                "rounds": len(found),
                "seconds": spread(wall),
                "ratio_to_first": spread(ratios(wall, firsts[0])),
                "cpu_seconds": spread(cpu),
                "cpu_ratio_to_first": spread(ratios(cpu, firsts[1])),
                "peak_bytes": peak,
                "peak_bytes_beyond_gradients": max(0, peak - gradient_bytes),
            }
        )
        progress()
    problem.clear()
    return rows


def ratios(values: Sequence[float], firsts: Sequence[float]) -> list[float]:
    """Return the ratio of two times in each round."""
    return [value / first for value, first in zip(values, firsts, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles."""
    lower, _, upper = statistics.quantiles(values, n=4)
    return {"median": statistics.median(values), "lower": lower, "upper": upper}
