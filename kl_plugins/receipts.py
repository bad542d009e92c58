"""Receipts: proof that a process runs the regulariser that the user named."""

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
    "behaviour",
    "reward_site",
    "aggregation",
    "sampling",
)
"""Fields in which the receipts of all ranks have to agree."""


class MissingReceiptError(RuntimeError):
    """A process that should be patched gave no receipt; the run must stop before its first update."""


@dataclass(frozen=True)
class Receipt:
    """What one process has patched and which gradient it will estimate.

    Attributes:
        rank, world_size: position in the host's own worker group.
        host, host_version: the framework it was put into.
        patches: qualified names of the wrapped functions.
        fingerprint: digest of the wrapped sources.
        spec: the canonical spec.
        target: which gradient its expectation estimates.
        behaviour: where the behaviour policy's log-probs come from (``sampler``, ``old``, ``current``, ``unused``).
        aggregation: how this host turns per-token terms into one number.
        sampling: how responses are sampled, and which log-probs the engine reports.
        caveats: what bends the estimate although the target stays: of the spec, and of this host's settings.
        reward_site: what this host does with a KL in reward, or empty.
        cost: what the spec makes this host do beside its own work, or empty.
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
    caveats: tuple[str, ...] = ()
    pid: int = field(default_factory=os.getpid)
    node: str = field(default_factory=socket.gethostname)

    def line(self) -> str:
        """One log line."""
        site = f", reward site: {self.reward_site}" if self.reward_site else ""
        cost = f", costs {self.cost}" if self.cost else ""
        aggregation = f", aggregation {self.aggregation}" if self.aggregation else ""
        sampling = f", sampling: {self.sampling}" if self.sampling else ""
        caveats = f", caveats: {'; '.join(self.caveats)}" if self.caveats else ""
        return (
            f"kl-plugins: {self.spec} active in {self.host} {self.host_version}, "
            f"rank {self.rank} of {self.world_size} (pid {self.pid} on {self.node}), "
            f"target {self.target}, behaviour {self.behaviour}{aggregation}{sampling}{site}{cost}, "
            f"patched {', '.join(self.patches)} [{self.fingerprint[:12]}]{caveats}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for transport between processes."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Receipt:
        """Rebuild what :meth:`to_dict` wrote."""
        return cls(**{**data, **{name: tuple(data.get(name, ())) for name in ("patches", "caveats")}})


def check_receipts(receipts: Sequence[Receipt], world_size: int) -> None:
    """Raise unless every rank gave one receipt and all name the same regulariser.

    Args:
        receipts: what arrived.
        world_size: size of the host's own worker group.

    Raises:
        MissingReceiptError: a rank is missing, doubled, or runs something else.
    """
    by_rank = {receipt.rank: receipt for receipt in receipts}
    missing = sorted(set(range(world_size)) - set(by_rank))
    if missing:
        present = ", ".join(f"rank {r.rank} (pid {r.pid} on {r.node})" for r in by_rank.values()) or "none"
        raise MissingReceiptError(
            f"kl-plugins: no receipt from rank {', '.join(map(str, missing))} of {world_size}; present: {present}. "
            "That process would train without the KL regulariser you named. "
            "Install kl-plugins there and attach it in every process, then start again."
        )
    if len(receipts) != world_size:
        raise MissingReceiptError(
            f"kl-plugins: {len(receipts)} receipts for {world_size} ranks; two processes claim one rank."
        )
    for name in COMPARED:
        seen = {getattr(receipt, name): receipt for receipt in receipts}
        if len(seen) > 1:
            found = "; ".join(f"rank {receipt.rank} on {receipt.node}: {value}" for value, receipt in seen.items())
            raise MissingReceiptError(f"kl-plugins: ranks disagree on {name}: {found}. Make the installations equal.")
