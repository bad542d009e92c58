"""Descriptors of host frameworks, which the command line finds through entry points."""

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
    """One finding of ``kl-plugins doctor``.

    Attributes:
        level: ``ok``; ``absent`` for an optional part that is not installed; ``warning``; or ``fault``, which makes the
            exit status of ``doctor`` 1.
        subject: the part of the installation that was checked.
        message: the result of the check.
        remedy: what the user can do about it; empty if there is nothing to do.
    """

    level: Level
    subject: str
    message: str
    remedy: str = ""


class HostModule(Protocol):
    """Interface of the module that :attr:`Host.module` names. Importing that module must not import the host."""

    def attach(self) -> None:
        """Put the hooks of kl-plugins into the host; a second call has no effect."""

    def detach(self) -> None:
        """Restore the host's original objects; a second call has no effect."""

    def diagnose(self) -> Sequence[Finding]:
        """Check the host's version, the fingerprints of the hooked functions and the backends, without training."""

    def run(self, module: str, argv: Sequence[str]) -> int:
        """Run one of the host's programs with kl-plugins attached.

        Args:
            module: the name of the host, or a dotted module of one of its packages.
            argv: the arguments of the program.

        Returns:
            The exit status of the program.
        """


@dataclass(frozen=True)
class Host:
    """A host framework that kl-plugins can attach to. It holds strings only, so it is fast to import.

    Attributes:
        name: the name that users write, for example ``trl``.
        distribution: its name on the package index.
        packages: its top-level import names; ``kl-plugins run`` finds the host by them.
        supported: PEP 440 specifier of the versions whose sources were checked.
        tested: the versions with which the test suite runs.
        keys: maps each placement to the setting of this host that takes the spec.
        module: dotted path of the :class:`HostModule`.
        aggregation: one sentence on how this host turns per-token terms into one loss, and on the setting that
            determines it.
        title: how the host spells its own name, for example ``TRL``.
        explainer: dotted path of the module that explains this host's configs, a
            :class:`~kl_plugins.explain.config.ConfigExplainer`; empty if there is none.
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
    explainer: str = ""

    def installed_version(self) -> str | None:
        """Return the installed version, or None if the host is not installed, without importing the host."""
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return None

    def load(self) -> HostModule:
        """Import and return the adapter of this host."""
        return cast(HostModule, importlib.import_module(self.module))


@dataclass(frozen=True)
class BrokenHost:
    """An entry point that gives no usable host descriptor.

    Attributes:
        name: name of the entry point.
        value: the object that it points to, as ``module:attribute``.
        distribution: the package that declares it.
        error: type and message of the error that loading it raised.
    """

    name: str
    value: str
    distribution: str
    error: str

    def __str__(self) -> str:
        return f"entry point {self.name!r} = {self.value!r} of package {self.distribution!r}: {self.error}"


class HostRegistry(NamedTuple):
    """All entry points of the group. Broken ones are kept apart, so that they do not hide the others.

    Attributes:
        hosts: the usable descriptors, by name of their entry point.
        broken: the entry points that could not be loaded.
    """

    hosts: dict[str, Host]
    broken: tuple[BrokenHost, ...]


def discover_hosts() -> HostRegistry:
    """Load every host descriptor that is registered under the entry-point group, without importing any host."""
    hosts: dict[str, Host] = {}
    broken = []
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP)):
        try:
            host = point.load()
            if not isinstance(host, Host):
                raise TypeError(f"it is a {type(host).__name__}, not a {Host.__qualname__}")
            hosts[point.name] = host
        except Exception as error:  # a third-party module may raise anything; the report shows it
            owner = point.dist.name if point.dist else "unknown"
            broken.append(BrokenHost(point.name, point.value, owner, f"{type(error).__name__}: {error}"))
    return HostRegistry(hosts, tuple(broken))


def installed_hosts() -> dict[str, Host]:
    """Return every usable host descriptor, by name; :func:`discover_hosts` returns the broken ones as well."""
    return discover_hosts().hosts
