"""Exact KL inside the forward pass of a model that FSDP2 shards over two gloo processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.core.exact.fsdp_worker import gradients, problem
from tests.core.exact.processes import run_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[bool, Any]]:
    return run_ranks("tests.core.exact.fsdp_worker", 2, tmp_path_factory.mktemp("fsdp"))


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
