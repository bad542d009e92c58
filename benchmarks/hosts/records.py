"""The record that a host's worker makes of each case, and the files that it shares with the comparison program."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.hosts.cases import Case


@dataclass
class Record:
    """The record of one update.

    Attributes:
        case: the case that was run.
        pull: (B, T) gradient of the whole step's loss with respect to each token's log-prob; 0 where there is no token.
        log_probs: (B, T) log-probs of the policy, as the host computed them for this update, nats.
        micro_batches: sequences of each micro-batch, in order.
        loss: the step's loss, which is the host's own aggregate of the KL, including beta.
        logged: the value that the host logs as its KL.
        gradient: parameter gradient by name, as the host's optimizer got it.
    """

    case: Case
    pull: Tensor
    log_probs: Tensor
    micro_batches: list[list[int]] = field(default_factory=list)
    loss: float = 0.0
    logged: float | None = None
    gradient: dict[str, Tensor] = field(default_factory=dict)

    def take(self, index_of: Callable[[list[int]], int], ranks: list[tuple[list[dict[str, Any]], list[float]]]) -> None:
        """Store what was recorded in a host's processes; such hosts average gradients over processes.

        Args:
            index_of: returns the index of the fixture's sequence with the given response tokens.
            ranks: for each process, its micro-batches and their losses.
        """
        for seen, losses in ranks:
            self.loss += sum(losses) / len(ranks)
            for micro_batch in seen:
                indices = [index_of(tokens) for tokens in micro_batch["responses"]]
                self.micro_batches.append(indices)
                for row, index in enumerate(indices):
                    on = micro_batch["mask"][row]
                    self.pull[index, : int(on.sum())] = micro_batch["pull"][row][on] / len(ranks)
                    self.log_probs[index, : int(on.sum())] = micro_batch["log_probs"][row][on]

    @classmethod
    def empty(cls, case: Case, lengths: list[int]) -> Record:
        """Return a record without any data."""
        shape = len(lengths), max(lengths)
        return cls(case, torch.zeros(shape), torch.zeros(shape))

    def see(self, index_of: Callable[[list[int]], int], tokens: Tensor, mask: Tensor, logp: Tensor) -> None:
        """Store one micro-batch, and record the gradient of its log-probs in the backward pass.

        Args:
            index_of: returns the index of the fixture's sequence with the given response tokens.
            tokens: (b, t) response tokens.
            mask: (b, t), True where there is a token.
            logp: (b, t) log-probs with their graph, nats.
        """
        places = [(index_of(row[on].tolist()), on) for row, on in zip(tokens, mask.bool(), strict=True)]
        self.micro_batches.append([index for index, _ in places])
        for (index, on), row in zip(places, logp.detach(), strict=True):
            self.log_probs[index, : int(on.sum())] = row[on].float()

        def keep(gradient: Tensor) -> None:
            for (index, on), row in zip(places, gradient, strict=True):
                self.pull[index, : int(on.sum())] += row[on].float()

        logp.register_hook(keep)  # type: ignore[no-untyped-call]


def read_cases(path: Path) -> Iterator[Case]:
    """Yield the cases that a worker must run."""
    return (Case(**data) for data in json.loads(path.read_text()))


def write_cases(path: Path, cases: list[Case]) -> None:
    """Write the file that :func:`read_cases` reads."""
    path.write_text(json.dumps([case.to_dict() for case in cases], indent=1))


def save(path: Path, host: str, version: str, records: list[Record]) -> None:
    """Write a worker's results."""
    rows: list[dict[str, Any]] = [{**vars(record), "case": record.case.to_dict()} for record in records]
    torch.save({"host": host, "version": version, "records": rows}, path)


def load(path: Path) -> tuple[str, str, list[Record]]:
    """Read a worker's results: the host, its version and its records."""
    found = torch.load(path)
    return found["host"], found["version"], [Record(**{**row, "case": Case(**row["case"])}) for row in found["records"]]
