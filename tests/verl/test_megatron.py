"""Specs in veRL's Megatron engine, split over tensor and pipeline ranks on a CPU; ``tests.support.verl.megatron``."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kl_plugins import KLSpec
from kl_plugins.adapters.controller import Controller
from kl_plugins.adapters.verl import HOST
from kl_plugins.adapters.verl.session import Session, loss_elsewhere
from tests.core.exact.processes import ROOT, run_ranks

MEGATRON = ROOT / ".nox" / "megatron"
"""Where ``nox -s verl_megatron`` puts megatron-core. It is beside the environment, because veRL looks for it there."""

SPLITS = [(1, 1), (2, 1), (1, 2)]
"""Tensor ranks and pipeline ranks."""


@pytest.fixture(scope="module", params=SPLITS, ids=["one process", "two tensor ranks", "two stages"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not MEGATRON.exists():
        pytest.skip("megatron-core is not there; run nox -s verl_megatron")
    tensor, pipeline = request.param
    size, folder = tensor * pipeline, tmp_path_factory.mktemp("megatron")
    paths = {"PYTHONPATH": str(MEGATRON), "VERL_PLATFORM": "cpu"}
    return run_ranks("tests.support.verl.megatron", size, Path(folder), str(tensor), str(pipeline), **paths)


@pytest.mark.full
def test_a_step_under_a_spec_is_verls_own_with_the_same_gradient(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        own, ours, weighted = (found[name]["parameters"] for name in ("native", "spec", "weighted"))
        assert own.keys() == ours.keys()
        assert all(torch.equal(own[name], ours[name]) for name in own)
        assert any(not torch.equal(ours[name], weighted[name]) for name in own)


@pytest.mark.full
def test_beta_is_the_same_on_all_ranks_and_one_rank_counts(ranks: list[dict[str, Any]]) -> None:
    betas = {found["weighted"]["beta"] for found in ranks}
    assert len(betas) == 1
    assert betas != {0.1}
    assert [found["spec"]["counted"] for found in ranks].count(True) == 1
    assert sum("kl_plugins/sum/kl/weight/mean" in found["weighted"].get("metrics", ()) for found in ranks) == 1


@pytest.mark.full
def test_a_number_that_is_not_finite_stops_every_rank(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert "LogProbError: kl-plugins: the log-probs of the reference on 1 of 10" in found["not finite"]["error"]


def test_a_stage_without_the_loss_takes_part_in_the_sum_and_follows_beta() -> None:
    spec = KLSpec.parse("k2@loss/beta:dual-0.1-0.1")

    def session(**given: Any) -> Session:
        return Session(HOST, spec, Controller(spec.beta, 0.1, "beta"), **given)

    logp = torch.full((2, 3), -1.0)
    last, first = session(), session(counted=False, elsewhere=torch.device("cpu"))
    last.add(torch.tensor([0.0, 0.0, 0.0, 0.0, 6.0]), logp, logp - 0.5, torch.ones(2, 3, dtype=torch.bool))
    sent: list[Tensor] = []

    def total(numbers: Tensor) -> Tensor:
        sent.append(numbers.clone())
        return sent[0]

    last.check(total)
    first.check(total)
    assert sent[0].shape == sent[1].shape
    assert sent[0].any()
    assert not sent[1].any()
    assert first.controller.due(0.1) == last.controller.due(0.1) != 0.1
    with pytest.raises(RuntimeError, match="without having computed the loss"):
        session().check(total)


def test_a_process_without_megatron_computes_its_loss() -> None:
    assert loss_elsewhere() is None
