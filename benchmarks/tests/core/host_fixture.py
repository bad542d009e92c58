"""A fixture of the comparison of hosts whose models are tables of logits, and records that a host would leave."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.hosts.cases import BETA, Case, placement_of
from benchmarks.hosts.records import Record
from benchmarks.hosts.reference import Oracle

LENGTHS = (3, 5, 2, 4)
VOCABULARY = 6
MICRO_BATCHES = [[0, 2], [3, 1]]


class Policy:
    """A table of logits, one row per token of the fixture."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(3)
        tokens = sum(LENGTHS)

        def table() -> Tensor:
            return torch.randn(tokens, VOCABULARY, generator=random, dtype=torch.float64)

        # Shared, so that gradients of tokens overlap.
        self.shared = table()[0].requires_grad_()
        self.own = table().requires_grad_()
        self.actions = torch.randint(VOCABULARY, (tokens,), generator=random)
        self.others = {name: table() for name in ("model", "near", "far", "sampler")}

    @property
    def parameters(self) -> list[Tensor]:
        return [self.shared, self.own]

    def log_softmax(self) -> Tensor:
        return (self.own + self.shared).log_softmax(-1)

    def taken(self, table: Tensor) -> Tensor:
        return table.gather(-1, self.actions[:, None])[:, 0]

    def other(self, name: str) -> Tensor:
        return (0.3 * self.others[name] + self.log_softmax().detach()).log_softmax(-1)

    def exact(self) -> Tensor:
        logp = self.log_softmax()
        return (logp.exp() * (logp - self.other("near"))).sum(-1)

    def rows(self, values: Tensor) -> Tensor:
        gradients = [
            torch.autograd.grad(value, self.parameters, retain_graph=True, allow_unused=True) for value in values
        ]
        return torch.stack([torch.cat([g.flatten() for g in row if g is not None]) for row in gradients])


def oracle_of(policy: Policy, folder: Path) -> Oracle:
    """What ``benchmarks.hosts.fixture`` writes of models, of these tables."""
    logp = policy.taken(policy.log_softmax())
    others = {name: policy.taken(policy.other(name)) for name in policy.others}
    split = {name: list(row.detach().split(LENGTHS)) for name, row in {**others, "current": logp}.items()}
    exact = policy.exact()
    torch.save(
        {
            "log_probs": {name: rows for name, rows in split.items() if name != "sampler"},
            "sampler": split["sampler"],
            "score": policy.rows(logp),
            "exact": list(exact.detach().split(LENGTHS)),
            "exact_gradient": policy.rows(exact),
            "parameters": [("shared", tuple(policy.shared.shape)), ("own", tuple(policy.own.shape))],
            "group": 2,
        },
        folder / "oracle.pt",
    )
    return Oracle(folder)


def case_of(spec: str, host: str = "trl", aggregation: str = "dapo", **changes: Any) -> Case:
    return Case(spec, spec, {}, placement_of(spec), "near", aggregation, **changes)


def record_of(oracle: Oracle, host: str, case: Case, spec: str = "", factor: float = 1.0) -> Record:
    """What a flawless host would leave; or one that computes another `spec`, or normalises otherwise."""
    other = replace(case, spec=spec or case.spec)
    expected = oracle.expected(host, other, MICRO_BATCHES)
    weights = oracle.weights(host, case.aggregation, MICRO_BATCHES)
    gradient = (factor * expected.gradient).float()
    named, start = {}, 0
    for name, shape in oracle.parameters:
        size = torch.Size(shape).numel()
        named[name] = gradient[start : start + size].view(shape)
        start += size
    pull = (factor * BETA * weights * expected.coefficient).float()
    loss = factor * BETA * (expected.loss or 0.0)
    return Record(case, pull, oracle.log_probs["current"].float(), MICRO_BATCHES, loss, expected.loss, named)
