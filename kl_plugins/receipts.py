"""Receipts: each process states which regulariser it runs, so that a process without one is found before training."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

COMPARED = (
    "host",
    "host_version",
    "patches",
    "fingerprint",
    "spec",
    "observes",
    "behaviour",
    "reward_site",
    "aggregation",
    "sampling",
)
"""Fields that must be equal in the receipts of all ranks."""


class MissingReceiptError(RuntimeError):
    """The receipts of a run are incomplete or contradictory; the run must stop before its first update."""


@dataclass(frozen=True)
class Receipt:
    """The functions that one process has patched, and the gradient that it will estimate.

    Attributes:
        rank, world_size: position and size in the host's own worker group.
        host, host_version: name and version of the host framework.
        patches: qualified names of the wrapped functions.
        fingerprint: digest of the code of the wrapped functions.
        spec: the canonical text of the spec.
        target: name of the gradient that the spec estimates in expectation; a key of
            :data:`kl_plugins.spec.target.TARGETS`.
        behaviour: source of the behaviour policy's log-probs: ``sampler``, ``old``, ``current`` or ``unused``.
        reward_site: what this host does with a KL in the reward; empty for other placements.
        cost: work that the spec causes in this host in addition to the host's own; empty if there is none.
        aggregation: how this host turns per-token terms into one loss.
        sampling: how the host samples responses, and which log-probs the engine reports.
        observes: the text of the setting with ``observe``, if the spec is only measured; empty if it is applied.
        caveats: reasons in the spec or in this host's settings why the estimate deviates from the target.
        pid: process id.
        node: host name of the machine.
    """

    rank: int
    world_size: int
    host: str
    host_version: str
    patches: tuple[str, ...]
    fingerprint: str
    spec: str
    target: str
    behaviour: str
    reward_site: str = ""
    cost: str = ""
    aggregation: str = ""
    sampling: str = ""
    observes: str = ""
    caveats: tuple[str, ...] = ()
    pid: int = field(default_factory=os.getpid)
    node: str = field(default_factory=socket.gethostname)

    def line(self) -> str:
        """Return the receipt as one line for the log."""
        site = f", reward site: {self.reward_site}" if self.reward_site else ""
        cost = f", costs {self.cost}" if self.cost else ""
        aggregation = f", aggregation {self.aggregation}" if self.aggregation else ""
        sampling = f", sampling: {self.sampling}" if self.sampling else ""
        caveats = f", caveats: {'; '.join(self.caveats)}" if self.caveats else ""
        active = f"{self.spec} active in {self.host} {self.host_version}"
        if self.observes:
            active = (
                f"{self.observes} observes, changes nothing, in {self.host} {self.host_version}: measures {self.spec}"
            )
        return (
            f"kl-plugins: {active}, "
            f"rank {self.rank} of {self.world_size} (pid {self.pid} on {self.node}), "
            f"target {self.target}, behaviour {self.behaviour}{aggregation}{sampling}{site}{cost}, "
            f"patched {', '.join(self.patches)} [{self.fingerprint[:12]}]{caveats}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, which can be sent to another process."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Receipt:
        """Build a receipt from the result of :meth:`to_dict`."""
        return cls(**{**data, **{name: tuple(data.get(name, ())) for name in ("patches", "caveats")}})


def check_receipts(receipts: Sequence[Receipt], world_size: int) -> None:
    """Check that every rank gave exactly one receipt, and that all receipts name the same regulariser.

    Args:
        receipts: the receipts that arrived, in any order.
        world_size: number of ranks in the host's own worker group.

    Raises:
        MissingReceiptError: A rank gave no receipt, two processes have the same rank, or the receipts differ in one of
            the fields :data:`COMPARED`.
    """
    by_rank = {receipt.rank: receipt for receipt in receipts}
    missing = sorted(set(range(world_size)) - set(by_rank))
    if missing:
        present = ", ".join(f"rank {r.rank} (pid {r.pid} on {r.node})" for r in by_rank.values()) or "none"
        raise MissingReceiptError(
            f"kl-plugins: no receipt from rank {', '.join(map(str, missing))} of {world_size}; present: {present}. "
            "A process without a receipt would train without the KL regulariser that you named. "
            "Install kl-plugins there and attach it in every process, then start again."
        )
    if len(receipts) != world_size:
        raise MissingReceiptError(
            f"kl-plugins: {len(receipts)} receipts for {world_size} ranks; two processes claim the same rank."
        )
    for name in COMPARED:
        seen = {getattr(receipt, name): receipt for receipt in receipts}
        if len(seen) > 1:
            found = "; ".join(f"rank {receipt.rank} on {receipt.node}: {value}" for value, receipt in seen.items())
            raise MissingReceiptError(
                f"kl-plugins: ranks disagree on {name}: {found}. Use the same installation and settings on all nodes."
            )
