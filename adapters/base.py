"""The life cycle of a host, written once: attach, detach, diagnose, run, and the check of a run's settings.

Each host subclasses :class:`HostAdapter` in ``adapters/<host>/__init__.py`` and fills in what really differs. This
module holds the one import that goes from adapters to patches: :attr:`HostAdapter.hooks` loads
``kl_plugins.patches.<host>`` by name. Nothing here imports torch or a host.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol, cast

from packaging.specifiers import SpecifierSet

from kl_plugins.adapters.versions import ALLOW_UNTESTED, refuse_untested
from kl_plugins.hosts import Finding, Host
from kl_plugins.spec import KLSpec
from kl_plugins.spec.observation import Observation

PATCHES = "kl_plugins.patches.{host}"
"""Name of the package of a host's patches, the only way from adapters to patches."""

parse = lru_cache(maxsize=64)(KLSpec.parse)
"""Reads a spec's text once per process; hosts ask for it in every micro-batch."""

parse_observation = lru_cache(maxsize=64)(Observation.parse)
"""Reads a text with ``observe`` once per process."""


class Sources(Protocol):
    """The host's installed files; see :class:`kl_plugins.patches.engine.fingerprint.Sources`."""

    @property
    def checked(self) -> dict[str, dict[str, str]]:
        """Every checked fingerprint, by function and version."""

    def changed(self) -> Iterator[tuple[str, str | None]]:
        """Give the functions whose installed source is not a checked one, with its fingerprint."""

    def check(self) -> None:
        """Raise where the host's files are not those that were checked."""


class Hooks(Protocol):
    """What ``kl_plugins.patches.<host>.HOOKS`` offers."""

    @property
    def sources(self) -> Sources:
        """The host's files, to be compared with those that were checked."""

    def attach(self) -> None:
        """Put the hooks in; safe to call twice."""

    def detach(self) -> None:
        """Restore the host's original objects; safe to call twice."""

    def check_process(self) -> None:
        """Raise unless every hook that this process needs is in, on a host that was checked."""

    def summary(self, modules: Collection[str] = (), functions: Collection[str] = ()) -> tuple[tuple[str, ...], str]:
        """Name the wrapped functions, and give one digest of their sources, for a receipt."""


class HostAdapter(ABC):
    """One host framework under kl-plugins.

    Attributes:
        host: what the command line knows of it.
    """

    def __init__(self, host: Host) -> None:
        self.host = host

    # What hosts have in common.

    @property
    def hooks(self) -> Hooks:
        """The host's hooks; imports ``kl_plugins.patches.<host>``."""
        return cast(Hooks, importlib.import_module(PATCHES.format(host=self.host.name)).HOOKS)

    def attach(self) -> None:
        """Put the hooks into the host. Safe to call twice."""
        self.hooks.attach()

    def detach(self) -> None:
        """Restore the host's original objects. Safe to call twice."""
        self.hooks.detach()

    def run(self, module: str, argv: Sequence[str]) -> int:
        """Run a module of the host as ``python -m`` does, with the hooks in.

        Args:
            module: its dotted name.
            argv: its arguments; they are the host's own.

        Returns:
            Exit status; what the module raises passes through.
        """
        self.attach()
        return run_module(module, argv)

    def diagnose(self) -> list[Finding]:
        """Findings for ``kl-plugins doctor``; the host's files are read and not imported."""
        return list(self._findings())

    def _findings(self) -> Iterator[Finding]:
        host = self.host
        try:
            found = version(host.distribution)
        except PackageNotFoundError:
            command = f'pip install "{host.distribution}{host.supported}"'
            yield Finding("absent", host.name, "not installed", f"{command} if you train with {host.title}")
            return
        subject = f"{host.name} {found}"
        remedy = (
            f"install {host.distribution}{host.supported}, or set {ALLOW_UNTESTED}=1 and check the kl/ metrics yourself"
        )
        if not SpecifierSet(host.supported).contains(found, prereleases=True):
            yield Finding("fault", subject, f"outside the checked versions {host.supported}", remedy)
            return
        tested = found in host.tested
        yield Finding(
            "ok", subject, "tested version" if tested else f"sources checked; the tests run {', '.join(host.tested)}"
        )
        try:
            changed = list(self.hooks.sources.changed())
        except ModuleNotFoundError as error:
            yield Finding("fault", subject, str(error), f"reinstall {host.distribution}")
            return
        for name, digest in changed:
            problem = f"its source is not one that was checked ({digest})"
            yield Finding("fault", f"{subject} {name}", problem, remedy)
        if not changed:
            known = len(self.hooks.sources.checked)
            yield Finding("ok", f"{subject} sources", f"{known} wrapped functions have known fingerprints")
        yield from self.further_findings(found)

    def checked(self, config: Any) -> Any:
        """Read the specs of a run's settings, after every check that needs no model.

        Args:
            config: the host's settings, as :meth:`specs_of` takes them.

        Returns:
            What :meth:`specs_of` gave.

        Raises:
            KLSpecError: a text is not a valid spec.
            ValueError: a spec and other settings contradict each other; the message says what to do.
            UnsupportedHostError: this host, or a part of it that the settings pick, was not checked.
        """
        specs = self.specs_of(config)
        for key, observation, problem in self.unobservable(config):
            raise ValueError(f"kl-plugins: {key}{observation} cannot be used here: {problem}")
        if specs:
            for key, spec, problem in self.refusals(specs, config):
                raise ValueError(f"kl-plugins: {key}{spec} cannot be used here: {problem}")
        if specs or self.observation_of(config) is not None:
            self.hooks.check_process()
            self.hooks.sources.check()
            for problem in self.untested(config):
                refuse_untested(problem)
        return specs

    # What a host fills in.

    @abstractmethod
    def specs_of(self, config: Any) -> Any:
        """Read the spec or specs that the settings ask for; something false if they hold the host's own words alone."""

    @abstractmethod
    def refusals(self, specs: Any, config: Any) -> Iterator[tuple[str, KLSpec, str]]:
        """Give each contradiction: the setting up to the spec (``kl_loss_type=``), the spec, and the problem."""

    def observation_of(self, config: Any) -> Observation | None:
        """Read what the settings ask to observe, with its spec; None if they do not.

        Raises:
            KLSpecError: the text with ``observe`` is not valid.
        """
        return None

    def unobservable(self, config: Any) -> Iterator[tuple[str, Observation, str]]:
        """Give each reason why a run cannot be observed: the setting up to the text, the text, and the problem."""
        yield from ()

    def untested(self, config: Any) -> Iterator[str]:
        """Name each part of the host that the settings pick and that the tests do not run."""
        yield from ()

    def further_findings(self, found: str) -> Iterator[Finding]:
        """Give further lines of ``kl-plugins doctor``.

        Args:
            found: the installed version.
        """
        yield from ()


def run_module(module: str, argv: Sequence[str]) -> int:
    """Run a module as ``__main__``.

    Args:
        module: its dotted name.
        argv: its arguments.

    Returns:
        Exit status; what the module raises passes through.
    """
    sys.argv = [module, *argv]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    return 0
