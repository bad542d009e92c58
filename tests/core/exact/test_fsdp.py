"""Exact KL inside the forward pass of a model that FSDP2 shards over two gloo processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.core.exact.fsdp_worker import gradients, problem

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[bool, Any]]:
    folder = tmp_path_factory.mktemp("fsdp")
    command = [sys.executable, "-m", "tests.core.exact.fsdp_worker"]
    started = [
        subprocess.Popen(
            [*command, str(rank), "2", str(folder / "rendezvous"), str(folder / f"{rank}.pt")],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    try:
        messages = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), messages[0][-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("frozen_head", [False, True], ids=["full", "frozen head"])
def test_sharded_model_equals_the_whole_one(ranks: list[dict[bool, Any]], frozen_head: bool) -> None:
    expected: dict[str, torch.Tensor] = {}
    for rank, saved in enumerate(ranks):
        policy, reference, inputs, labels = problem(rank, frozen_head)
        kl = policy(inputs, reference, labels)
        kl.mean().backward()
        torch.testing.assert_close(saved[frozen_head]["kl"], kl.detach())
        for name, gradient in gradients(policy).items():
            expected[name] = expected.get(name, 0) + gradient / len(ranks)
    assert ("head.weight" in expected) is not frozen_head
    for saved in ranks:
        assert saved[frozen_head]["gradients"].keys() == expected.keys()
        for name, gradient in saved[frozen_head]["gradients"].items():
            assert gradient.norm() > 0
            torch.testing.assert_close(gradient, expected[name])
