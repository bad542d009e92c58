"""Hooks that go in as the host imports its modules, with nothing heavy imported before; for worker processes.

The table of hooks is loaded with the first of the host's modules, because its wrappers need torch.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import wrapt

from kl_plugins.adapters.versions import UnsupportedHostError, check_version
from kl_plugins.hosts import Host

if TYPE_CHECKING:
    from kl_plugins.patches.engine.fingerprint import Sources
    from kl_plugins.patches.engine.patch import PatchSet

logger = logging.getLogger(__name__)


@dataclass
class ImportHooks:
    """The hooks of one host, put in module by module.

    Attributes:
        host: the host.
        folder: of the host's patches; holds the fingerprints and ``hooks.py``, whose ``PATCHES`` is the table of hooks.
        modules: the host's modules that have hooks.
        early: hooks of further modules, for those that are imported where the table must not be: by module, what puts
            the hook in.
        failures: hooks that could not be put in. A process without a spec must go on, so whoever uses a spec raises.
    """

    host: Host
    folder: Path
    modules: Sequence[str]
    early: Mapping[str, Callable[[Any], None]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    _attached: bool = False

    @property
    def patches(self) -> PatchSet:
        """The table; imports it."""
        table = importlib.import_module(f"kl_plugins.patches.{self.folder.name}.hooks")
        return cast("PatchSet", table.PATCHES)

    @cached_property
    def sources(self) -> Sources:
        """The host's files, to be compared with those that were checked."""
        from kl_plugins.patches.engine.fingerprint import Sources

        return Sources(self.host, self.folder / "fingerprints.json")

    def attach(self) -> None:
        """Put the hooks in, now where a module is imported and later where it is not. Safe to call twice."""
        if self._attached:
            return
        self._attached = True
        logger.info("kl-plugins: hooks for %d modules of %s registered", len(self.modules), self.host.title)
        for module in (*self.early, *self.modules):
            wrapt.register_post_import_hook(self._imported, module)

    def detach(self) -> None:
        """Restore the host's original functions. Safe to call twice.

        Raises:
            RuntimeError: another package wrapped a hook.
        """
        if self._attached:
            self.patches.undo()
        self._attached = False
        self.failures.clear()

    def check_process(self) -> None:
        """Raise unless every hook that this process needs is in, on a host that was checked.

        Raises:
            UnsupportedHostError: unknown version, changed source, or a hook that is not in.
        """
        found = check_version(self.host.distribution, self.host.supported)
        if self.failures:
            raise UnsupportedHostError(
                f"kl-plugins: could not attach to {self.host.title} {found}: {'; '.join(self.failures)}. Run "
                "`kl-plugins doctor`"
            )
        self.patches.check_imported()

    def summary(self, modules: Collection[str] = (), functions: Collection[str] = ()) -> tuple[tuple[str, ...], str]:
        """Name the wrapped functions for a receipt; see :meth:`~kl_plugins.patches.engine.patch.PatchSet.summary`."""
        return self.patches.summary(modules, functions)

    def _imported(self, module: Any) -> None:
        if not self._attached:
            return
        try:
            put_in = self.early.get(module.__name__)
            if put_in is None:
                self.patches.apply(module.__name__)
            else:
                put_in(module)
        except Exception as error:
            self.failures.append(f"{module.__name__}: {type(error).__name__}: {error}")
            logger.error("kl-plugins: not attached to %s; a KL spec will be refused: %s", module.__name__, error)
