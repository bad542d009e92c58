"""Vocabulary-sharded exact KL over real gloo groups of two and four processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kl_plugins import exact_kl
from kl_plugins.kernels.backend import BackendError
from kl_plugins.tensor_parallel import sharded_exact_kl
from tests.core.exact.accuracy import ROOM
from tests.core.exact.processes import run_ranks
from tests.core.exact.sharded_worker import CASES, RankResults, Sharded, bounds, without_mass
from tests.core.exact.triton_cases import Case, Inputs, inputs, reference_of

WORKER = "tests.core.exact.sharded_worker"
Group = list[dict[str, Any]]


@pytest.fixture(scope="module", params=["2 eager", "4 eager", "2 triton"])
def group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Group:
    size, backend = request.param.split()
    if backend == "triton":
        pytest.importorskip("triton")
    interpreted = {"TRITON_INTERPRET": "1"} if backend == "triton" else {}
    return run_ranks(WORKER, int(size), tmp_path_factory.mktemp("group"), backend, **interpreted)


def ranks_of(group: Group, name: str) -> list[RankResults]:
    return [RankResults(*rank[name]) for rank in group]


def check(found: list[RankResults], given: Inputs, case: Case) -> None:
    true = reference_of(given, case)
    for rank in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(rank[:3], found[0][:3], strict=True))
    assert all(part.isfinite().all() for rank in found for part in rank[:4])
    kl, logp, ref_logp = (part.double() for part in found[0][:3])
    assert (kl >= 0).all()
    assert (kl - true.kl).norm() <= ROOM * 1e-5 * true.kl.norm()
    torch.testing.assert_close(logp, true.logp, rtol=1e-6, atol=5e-6)
    torch.testing.assert_close(ref_logp, true.ref_logp, rtol=1e-6, atol=1e-5)
    gradient = torch.cat([rank.gradient for rank in found], dim=-1).double()
    # Triton's interpreter truncates to bfloat16: each number is off by up to 2^-7, 7.8e-3.
    tolerance = ROOM * 1e-4 if case.dtype == torch.float32 else 8e-3
    assert (gradient - true.gradient).norm() <= tolerance * true.gradient.norm() + ROOM * 5e-6


@pytest.mark.parametrize("name", CASES)
def test_shards_agree_with_float64_on_whole_rows(group: Group, name: str) -> None:
    case = CASES[name].case
    check(ranks_of(group, name), inputs(case), case)


def test_labels_lie_on_other_ranks(group: Group) -> None:
    # The premise of the test above: every rank holds some labels and lacks others.
    for name in ("many rows", "near"):
        starts = bounds(CASES[name], len(group))
        holders = torch.bucketize(inputs(CASES[name].case).labels, torch.tensor(starts[1:]), right=True)
        assert holders.unique().numel() > 1, name


def test_a_shard_without_policy_mass(group: Group) -> None:
    case = CASES["even"].case
    check(ranks_of(group, "without mass"), without_mass(case, *bounds(CASES["even"], len(group))[1:3]), case)


def test_shards_agree_with_the_unsharded_function(group: Group) -> None:
    given = inputs(CASES["uneven"].case)
    whole = exact_kl(*given[:3], backend="eager")
    found = ranks_of(group, "uneven")[0]
    for part, other in zip(found[:3], whole, strict=True):
        torch.testing.assert_close(part, other, rtol=3e-6, atol=3e-6)


def test_ignored_rows_are_exactly_zero_whatever_they_hold(group: Group) -> None:
    ignored = inputs(CASES["ignored rows"].case).labels == -100
    assert ignored.any()
    for rank in ranks_of(group, "ignored rows"):
        assert all(not part[ignored].any() for part in rank[:4])


def test_a_forward_pass_is_two_collectives_and_a_backward_pass_none(group: Group) -> None:
    for name, sharded in CASES.items():
        for rank in ranks_of(group, name):
            assert (rank.forward, rank.backward) == (2, 0)
            rows, eager = sharded.case.rows, group[0]["backend"] == "eager"
            # Different soft-caps are computed in float64, so the sums travel as such.
            sums = "torch.float64" if eager and sharded.case.softcap != sharded.case.ref_softcap else "torch.float32"
            assert rank.sent == [("MAX", (4, rows), "torch.float32"), ("SUM", (5, rows), sums)]


def test_groups_side_by_side_do_not_mix(group: Group) -> None:
    if len(group) < 4:
        pytest.skip("needs two groups")
    for ranks, distance in ((group[:2], 0.1), (group[2:], 0.5)):
        case = CASES["even"].case._replace(distance=distance)
        check(ranks_of(ranks, "subgroups"), inputs(case), case)


def test_a_label_that_no_rank_holds_or_several_is_refused_on_all_of_them(group: Group) -> None:
    for rank in group:
        for mistake in ("no such token", "overlap", "gap"):
            assert "held by no rank or by several" in rank["refused"][mistake], mistake
        assert rank["refused"]["ignored"] == ""


def test_calls_that_cannot_be() -> None:
    logits, labels = torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"needs torch\.distributed; for whole rows of logits use exact_kl"):
        sharded_exact_kl(logits, logits, labels, vocab_start=0)
    with pytest.raises(ValueError, match="vocab_start=-1"):
        sharded_exact_kl(logits, logits, labels, vocab_start=-1)
    with pytest.raises(ValueError, match="must be one"):
        sharded_exact_kl(logits, logits[:, 1:], labels, vocab_start=0)
    with pytest.raises(BackendError, match="compiled"):
        sharded_exact_kl(logits, logits, labels, vocab_start=0, backend="compiled")


def test_uneven_and_narrow_cuts_are_what_they_say() -> None:
    assert bounds(Sharded(Case(vocab=12), "uneven"), 3) == [0, 2, 6, 12]
    assert bounds(Sharded(Case(vocab=13), "narrow"), 4) == [0, 1, 5, 9, 13]
