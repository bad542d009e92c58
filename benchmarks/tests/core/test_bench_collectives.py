"""The count of collectives: what it sees, whom it blames, and that a difference from paper shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.collectives import report
from benchmarks.collectives.count import Counter, Seen, ours, payload
from benchmarks.collectives.plan import MOST_CARRIED, SCHEDULE, TOP_K, Added, carried, paper
from kl_plugins import KLSpec
from kl_plugins.adapters.controller import Controller
from kl_plugins.adapters.openrlhf import HOST
from kl_plugins.adapters.openrlhf.batch import MicroBatch
from kl_plugins.adapters.openrlhf.session import WorkerSession
from kl_plugins.metrics import REDUCTIONS


@pytest.fixture
def group(tmp_path: Any) -> Any:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_plugins_collectives_are_told_from_others(group: None) -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    logp = torch.randn(2, 3)
    spec = KLSpec.parse("k3@loss")
    session = WorkerSession(HOST, spec, Controller(spec.beta, 0.1, "beta"))
    batch = MicroBatch(session, mask, logp, None)
    with Counter() as counter:
        batch.term(logp, logp - 0.1)
        session.check_step()
        session.keep(batch)
        session.report()
        dist.all_reduce(torch.zeros(5))
    added = ours(counter.seen)
    expected = paper("openrlhf", "k3@loss", 1, 2)
    assert [one.operation for one in added] == ["allreduce_"] * 3
    assert sorted(one.bytes for one in added) == sorted(expected.reductions)
    (other,) = [one for one in counter.seen if one not in added]
    assert (other.operation, other.bytes) == ("allreduce_", 20)
    assert other.by.endswith("test_the_plugins_collectives_are_told_from_others")


def test_payload_is_what_goes_in(group: None) -> None:
    with Counter() as counter:
        dist.all_gather([torch.zeros(6)], torch.zeros(6))
        dist.broadcast(torch.zeros(3, dtype=torch.float64), 0)
    assert [one.bytes for one in counter.seen] == [24, 24]
    # Outputs come first: of all ranks in a gather, of one in a scatter.
    assert payload("_allgather_base_", (torch.zeros(14), torch.zeros(7))) == 28
    assert payload("_reduce_scatter_base_", (torch.zeros(2), torch.zeros(4))) == 16
    assert payload("allreduce_", ([torch.zeros(2), torch.zeros(3)],)) == 20


def test_paper_by_hand() -> None:
    metrics = len(REDUCTIONS) - 1  # without kl/exact
    # Of three pooled metrics, two are made of a square each; beside them beta, tokens, micro-batches, eight checks.
    assert paper("trl", "k3@loss", 3, 4) == Added((8 * (metrics - 3 + 2 + 3 + 8),) * 3)
    assert paper("trl", "exact@loss", 1, 4).bytes == paper("trl", "k3@loss", 1, 4).bytes + 8
    assert paper("trl", "k1@reward", 1, 4).gathers[1:] == (64, 16)
    assert paper("trl", "k1@advantage", 1, 4).gathers[1:] == (64,)
    assert paper("trl", SCHEDULE, 1, 4).reductions == (12,)
    assert paper("verl", SCHEDULE, 9, 4).reductions == (72,)
    assert paper("verl", TOP_K, 9, 4).reductions == (56,)
    assert paper("openrlhf", "k1@reward", 9, 4) == paper("verl", "k1@advantage", 9, 4) == Added()
    # An observation checks nothing before a step, and has one metric more.
    assert paper("trl", "observe:k2@loss", 3, 4).gathers == tuple(b + 8 for b in paper("trl", "k2@loss", 3, 4).gathers)
    assert paper("verl", "k3/observe:k2@loss", 9, 4) == Added()
    applied = paper("openrlhf", "k2@loss", 9, 4).reductions
    assert paper("openrlhf", "k3/observe:k2@loss", 9, 4).reductions == (applied[0] + 8, applied[1])
    both = Added((10,), (100,))
    assert (both.traffic(4), both.hops(4), both.hops(4, tree=True), both.hops(5, tree=True)) == (30 + 150, 9, 6, 9)
    assert Added((10,), (100,)).traffic(1) == 0


def test_the_default_k_keeps_to_the_budget_of_bytes_per_token() -> None:
    assert carried(KLSpec.parse(TOP_K)) == 4 * 17
    assert carried(KLSpec.parse("exact@loss/top:64")) == 516 <= MOST_CARRIED
    assert carried(KLSpec.parse("exact@loss/top")) == 4 * (2 * 16 + 1 + 3 * 8 + 1) <= MOST_CARRIED
    assert carried(KLSpec.parse("exact@loss")) == 0


def arm(*seen: Seen) -> dict[str, Any]:
    return {"seen": list(seen), "steps": 1, "micro_batches": 1, "sequences": 4}


def test_what_is_not_on_paper_shows() -> None:
    own = Seen("allgather_", 8, "verl.somewhere:step")
    sums = Seen("allreduce_", 48, "kl_plugins.patches.verl.worker:_total")
    good = report.row("verl", 2, "k3@loss", arm(own, sums), arm(own))
    assert good["agrees"]
    assert (good["calls"], good["bytes"], good["host_calls"], good["host_bytes"]) == (1, 48, 1, 0)
    for seen in (
        (own,),
        (own, sums, sums),
        (own, sums._replace(bytes=24)),
        (own, own, sums),
        (own, sums, Seen("broadcast_", 16, "kl_plugins.x:y")),
    ):
        assert not report.row("verl", 2, "k3@loss", arm(*seen), arm(own))["agrees"], seen


def test_nothing_on_paper_grows_with_tokens_or_vocabulary() -> None:
    model = report.scaling(["trl", "verl", "openrlhf"])
    largest = max(one["of_gradient"] for one in model if one["ranks"] <= 512)
    assert 0 < largest < 1e-3
