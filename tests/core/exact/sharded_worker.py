"""One rank of a group that computes sharded cases over gloo, and saves what it got.

``python -m tests.core.exact.sharded_worker RANK SIZE RENDEZVOUS_FILE RESULTS_FILE BACKEND``
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from kl_plugins.tensor_parallel import sharded_exact_kl
from tests.core.exact.processes import finish
from tests.core.exact.triton_cases import BF16, Case, Inputs, inputs


class Sharded(NamedTuple):
    """A case, and how its vocabulary is cut: ``even``, ``uneven``, or with one column on the first rank."""

    case: Case
    cut: str = "even"


CASES = {
    "even": Sharded(Case(vocab=1024, distance=0.05)),
    "uneven": Sharded(Case(vocab=1003, distance=0.05), "uneven"),
    "one column": Sharded(Case(vocab=301), "narrow"),
    "near": Sharded(Case(vocab=3000, distance=0.005, rows=9), "uneven"),
    "far": Sharded(Case(vocab=1000, std=12.0, distance=12.0)),
    "bf16": Sharded(Case(vocab=1000, dtype=BF16), "uneven"),
    "temperature": Sharded(Case(temperature=0.7)),
    "soft cap": Sharded(Case(softcap=30.0, ref_softcap=30.0, temperature=0.7), "uneven"),
    "different soft caps": Sharded(Case(softcap=30.0, ref_softcap=20.0)),
    "masked tokens": Sharded(Case(masked="scattered", std=2.0), "uneven"),
    "masked head": Sharded(Case(masked="head", std=1.0, distance=0.005, vocab=3000)),
    "ignored rows": Sharded(Case(ignored=True, rows=6)),
    "strided rows": Sharded(Case(layout="strided"), "uneven"),
    "many rows": Sharded(Case(vocab=64, rows=150)),
}


def bounds(sharded: Sharded, size: int) -> list[int]:
    """First columns of the ranks, and the end."""
    vocab = sharded.case.vocab
    if sharded.cut == "even":
        return [vocab * rank // size for rank in range(size + 1)]
    if sharded.cut == "narrow":
        return [0, *(1 + (vocab - 1) * rank // (size - 1) for rank in range(size))]
    weights = torch.arange(1, size + 1).cumsum(0)
    return [0, *(vocab * weights // weights[-1]).tolist()]


class RankResults(NamedTuple):
    """What one rank got; ``forward`` and ``backward`` count collectives, ``sent`` is what their calls were given."""

    kl: torch.Tensor
    logp: torch.Tensor
    ref_logp: torch.Tensor
    gradient: torch.Tensor
    forward: int
    backward: int
    sent: list[tuple[str, tuple[int, ...], str]]


def compute(
    given: Inputs, case: Case, start: int, stop: int, backend: str, group: dist.ProcessGroup | None = None
) -> RankResults:
    logits, ref_logits, labels, grad_kl, grad_logp = given
    leaf = logits.detach().requires_grad_()
    counted = group or dist.group.WORLD
    before = counted._get_sequence_number_for_group()
    with recorded() as sent:
        found = sharded_exact_kl(
            leaf[:, start:stop],
            ref_logits[:, start:stop],
            labels,
            vocab_start=start,
            group=group,
            temperature=case.temperature,
            softcap=case.softcap,
            ref_softcap=case.ref_softcap,
            backend=backend,
        )
    between = counted._get_sequence_number_for_group()
    (found.kl * grad_kl + found.logp * grad_logp).sum().backward()
    after = counted._get_sequence_number_for_group()
    gradient = leaf.grad[:, start:stop].clone()
    assert not leaf.grad[:, :start].any()
    assert not leaf.grad[:, stop:].any()
    return RankResults(*(part.detach() for part in found), gradient, between - before, after - between, sent)


@contextmanager
def recorded() -> Iterator[list[tuple[str, tuple[int, ...], str]]]:
    """Note what is given to all_reduce, and do it."""
    sent, real = [], dist.all_reduce

    def all_reduce(tensor: torch.Tensor, op: Any, *arguments: Any) -> Any:
        sent.append((str(op).rpartition(".")[2], tuple(tensor.shape), str(tensor.dtype)))
        return real(tensor, op, *arguments)

    dist.all_reduce = all_reduce
    try:
        yield sent
    finally:
        dist.all_reduce = real


def without_mass(case: Case, start: int, stop: int) -> Inputs:
    """Columns that the policy excludes altogether; labels lie elsewhere."""
    given = inputs(case)
    given.logits[:, start:stop] = -torch.inf
    labels = given.logits.float().argmax(-1)
    return given._replace(labels=labels)


def refused(start: int, stop: int, labels: list[int]) -> str:
    """The message that this rank raises."""
    logits = torch.zeros(len(labels), stop - start)
    try:
        sharded_exact_kl(logits, logits, torch.tensor(labels), vocab_start=start)
    except ValueError as error:
        return str(error)
    return ""


def main(rank: int, size: int, rendezvous: str, path: str, backend: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    results: dict[str, Any] = {"backend": backend}
    for name, sharded in CASES.items():
        start, stop = bounds(sharded, size)[rank : rank + 2]
        results[name] = tuple(compute(inputs(sharded.case), sharded.case, start, stop, backend))
    even = CASES["even"].case
    cut = bounds(CASES["even"], size)
    given = without_mass(even, *cut[1:3])
    results["without mass"] = tuple(compute(given, even, cut[rank], cut[rank + 1], backend))
    # Two groups side by side, with data of their own.
    if size == 4:
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        case = even._replace(distance=(0.1, 0.5)[rank // 2])
        cut = bounds(Sharded(case), 2)
        place = rank % 2
        results["subgroups"] = tuple(
            compute(inputs(case), case, cut[place], cut[place + 1], backend, groups[rank // 2])
        )
    results["refused"] = {
        "no such token": refused(4 * rank, 4 * rank + 4, [0, 4 * size]),
        "overlap": refused(3 * rank, 3 * rank + 4, [3]),
        "gap": refused(5 * rank, 5 * rank + 4, [4]),
        "ignored": refused(4 * rank, 4 * rank + 4, [-100, 0]),
    }
    finish(results, path)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
