"""What the command line knows of a host framework; hosts are found by entry point, never by name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Literal, NamedTuple, Protocol, cast

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
        aggregation: how this host turns per-token terms into one number, by the setting that decides it; one sentence.
        title: how the host spells its own name (``TRL``).
    """

    name: str
    distribution: str
    packages: tuple[str, ...]
    supported: str
    tested: tuple[str, ...]
    keys: Mapping[str, str] = field(hash=False)
    module: str
    aggregation: str = ""
    title: str = ""

    def installed_version(self) -> str | None:
        """The installed version, or None where the host is absent. Does not import the host."""
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return None

    def load(self) -> HostModule:
        """Import the adapter that knows this host."""
        return cast(HostModule, importlib.import_module(self.module))


@dataclass(frozen=True)
class BrokenHost:
    """An entry point that gives no usable host descriptor: name, what it points to, whose it is, what went wrong."""

    name: str
    value: str
    distribution: str
    error: str

    def __str__(self) -> str:
        return f"entry point {self.name!r} = {self.value!r} of package {self.distribution!r}: {self.error}"


class HostRegistry(NamedTuple):
    """What the entry-point group holds; one broken package must not hide the others."""

    hosts: dict[str, Host]
    broken: tuple[BrokenHost, ...]


def discover_hosts() -> HostRegistry:
    """Load every host descriptor registered under the entry-point group, by name. Imports no host."""
    hosts: dict[str, Host] = {}
    broken = []
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP)):
        try:
            host = point.load()
            if not isinstance(host, Host):
                raise TypeError(f"it is a {type(host).__name__}, not a {Host.__qualname__}")
            hosts[point.name] = host
        except Exception as error:  # whatever a third-party module raises belongs into the report
            owner = point.dist.name if point.dist else "unknown"
            broken.append(BrokenHost(point.name, point.value, owner, f"{type(error).__name__}: {error}"))
    return HostRegistry(hosts, tuple(broken))


def installed_hosts() -> dict[str, Host]:
    """Every usable host descriptor, by name; :func:`discover_hosts` also tells which ones are broken."""
    return discover_hosts().hosts
