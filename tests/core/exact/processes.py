"""Runs a worker module on every rank of a gloo group of real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

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
    assert all(rank.returncode == 0 for rank in ranks), messages[0][-3000:]
    return [torch.load(file) for file in files]
