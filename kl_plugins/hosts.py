"""What the command line knows of a host framework; hosts are found by entry point, never by name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Literal, Protocol, cast

ENTRY_POINT_GROUP = "kl_plugins.hosts"

Level = Literal["ok", "absent", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """One line of ``kl-plugins doctor``: what was looked at, what was found, what to do about it."""

    level: Level
    subject: str
    message: str
    remedy: str = ""


class HostModule(Protocol):
    """What the module named by :attr:`Host.module` offers. Importing it must not import the host."""

    def attach(self) -> None:
        """Put the KL seams into the host; safe to call twice."""

    def detach(self) -> None:
        """Restore the host's original objects; safe to call twice."""

    def diagnose(self) -> Sequence[Finding]:
        """Check version, fingerprints and backends without training anything."""

    def run(self, module: str, argv: Sequence[str]) -> int:
        """Run one of the host's programs under the plugin and return its exit status."""


@dataclass(frozen=True)
class Host:
    """A host framework that kl-plugins attaches to. Cheap to import: strings only.

    Attributes:
        name: what the user calls it (``trl``).
        distribution: its name on the package index.
        packages: top-level import names; ``kl-plugins run`` picks the host by them.
        supported: PEP 440 specifier of the versions whose sources were checked.
        tested: versions that the test-suite runs.
        keys: placement -> where the spec goes in this host.
        module: dotted path of the :class:`HostModule`.
    """

    name: str
    distribution: str
    packages: tuple[str, ...]
    supported: str
    tested: tuple[str, ...]
    keys: Mapping[str, str] = field(hash=False)
    module: str

    def installed_version(self) -> str | None:
        """The installed version, or None where the host is absent. Does not import the host."""
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return None

    def load(self) -> HostModule:
        """Import the adapter that knows this host."""
        return cast(HostModule, importlib.import_module(self.module))


def installed_hosts() -> dict[str, Host]:
    """Every host descriptor registered under the entry-point group, by name."""
    return {point.name: cast(Host, point.load()) for point in sorted(entry_points(group=ENTRY_POINT_GROUP))}
