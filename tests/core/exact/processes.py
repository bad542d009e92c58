"""Runs a worker module on every rank of a gloo group of real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[3]


def run_ranks(module: str, size: int, folder: Path, *arguments: str, **environment: str) -> list[Any]:
    """What each rank saved: called as ``module RANK SIZE RENDEZVOUS RESULT arguments``, each writes its result file."""
    files = [str(folder / f"{rank}.pt") for rank in range(size)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), str(size), str(folder / "rendezvous"), file, *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            text=True,
            stderr=subprocess.PIPE,
        )
        for rank, file in enumerate(files)
    ]
    try:
        messages = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(rank.returncode for rank in ranks):
        ends = (f"rank {index} ended with {rank.returncode}:" for index, rank in enumerate(ranks))
        raise AssertionError("\n".join(f"{end}\n{text[-3000:]}" for end, text in zip(ends, messages, strict=True)))
    return [torch.load(file) for file in files]


def finish(result: Any, file: str) -> NoReturn:
    """Save a rank's result, wait for those of the other ranks, and end the process without releasing the gloo group.

    A thread of the group can abort a process that ends in the usual way, see ``kl_plugins.adapters.trl.processes``.
    A rank that ends while another one still uses the group can make that one fail. No test is about either.
    """
    path = Path(file)
    torch.save(result, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)
    deadline = time.monotonic() + 120
    while not all(path.with_name(f"{rank}.pt").exists() for rank in range(dist.get_world_size())):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all ranks have saved a result in {path.parent}")
        time.sleep(0.05)
    sys.stderr.flush()
    os._exit(0)
