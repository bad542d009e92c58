"""Hooks that go in as the host imports its modules, and nothing heavy imported before; for hosts' worker processes.

The table of hooks is loaded with the first of the host's modules, because its wrappers need torch.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import wrapt

if TYPE_CHECKING:
    from kl_plugins.patches.patch import PatchSet

logger = logging.getLogger(__name__)


@dataclass
class ImportHooks:
    """The hooks of one host, put in module by module.

    Attributes:
        host: its name in messages.
        table: dotted module whose ``PATCHES`` is the host's :class:`~kl_plugins.patches.patch.PatchSet`.
        modules: the host's modules that have hooks.
        early: hooks of further modules, for those that are imported where the table must not be: by module, what puts
            the hook in.
        failures: hooks that could not be put in. A process without a spec must go on, so whoever uses a spec raises.
    """

    host: str
    table: str
    modules: Sequence[str]
    early: Mapping[str, Callable[[Any], None]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    _attached: bool = False

    def patches(self) -> PatchSet:
        """The table; imports it."""
        return cast("PatchSet", importlib.import_module(self.table).PATCHES)

    def attach(self) -> None:
        """Put the hooks in, now where a module is imported and later where it is not. Safe to call twice."""
        if self._attached:
            return
        self._attached = True
        logger.info("kl-plugins: hooks for %d modules of %s registered", len(self.modules), self.host)
        for module in (*self.early, *self.modules):
            wrapt.register_post_import_hook(self._imported, module)

    def detach(self) -> None:
        """Restore the host's original functions. Safe to call twice.

        Raises:
            RuntimeError: somebody wrapped a hook again.
        """
        if self._attached:
            self.patches().undo()
        self._attached = False
        self.failures.clear()

    def _imported(self, module: Any) -> None:
        if not self._attached:
            return
        try:
            put_in = self.early.get(module.__name__)
            if put_in is None:
                self.patches().apply_to(module.__name__)
            else:
                put_in(module)
        except Exception as error:
            self.failures.append(f"{module.__name__}: {type(error).__name__}: {error}")
            logger.error("kl-plugins: not attached to %s; a KL spec will be refused: %s", module.__name__, error)
