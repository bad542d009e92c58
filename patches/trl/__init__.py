"""Where kl-plugins goes into TRL: hooks in TRL's own classes, or in subclasses of them."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from kl_plugins.adapters.trl import HOST, unsloth
from kl_plugins.adapters.versions import check_version

if TYPE_CHECKING:
    from kl_plugins.patches.engine.fingerprint import Sources


class ClassHooks:
    """TRL's hooks. They go into classes as these are, and not as modules are imported: TRL loads no plugins itself.

    The table of hooks is loaded when it is needed, because its wrappers need torch.
    """

    @cached_property
    def sources(self) -> Sources:
        """TRL's files, to be compared with those that were checked."""
        from kl_plugins.patches.engine.fingerprint import Sources

        return Sources(HOST, Path(__file__).parent / "fingerprints.json")

    def attach(self) -> None:
        """Put the ``kl`` field and the hooks into TRL's own classes. Safe to call twice.

        Raises:
            UnsupportedHostError: this TRL is not one that kl-plugins was checked with, or Unsloth has rewritten it;
                nothing is changed then.
        """
        unsloth.refuse("attach() cannot put its hooks into TRL")
        from kl_plugins.patches.trl.hooks import FIELDS, PATCHES

        if PATCHES.active:
            return
        PATCHES.check()
        for field in FIELDS:
            field.apply()
        PATCHES.apply()

    def detach(self) -> None:
        """Restore TRL's original objects. Safe to call twice.

        Raises:
            RuntimeError: another package wrapped a hook.
        """
        from kl_plugins.patches.trl.hooks import FIELDS, PATCHES

        PATCHES.undo()
        for field in reversed(FIELDS):
            field.undo()

    def put_on(self, *classes: type) -> None:
        """Put the hooks on subclasses of TRL's classes, which themselves stay as they are.

        Args:
            *classes: each has the name of the class of TRL's that it is derived from.

        Raises:
            UnsupportedHostError: this TRL is not one that kl-plugins was checked with.
        """
        from kl_plugins.patches.engine.patch import PatchSet
        from kl_plugins.patches.trl.hooks import PATCHES

        for cls in classes:
            own = [patch for patch in PATCHES.patches if patch.qualname.startswith(f"{cls.__name__}.")]
            PatchSet(HOST, own, cls).apply()

    def check_process(self) -> None:
        """Raise unless TRL is a version that was checked.

        The hooks need no check here: it is a hook that asks, and :class:`~kl_plugins.adapters.trl.session.KLCallback`
        stops a run that went around one.

        Raises:
            UnsupportedHostError: it is another version.
        """
        check_version(HOST.distribution, HOST.supported)

    def summary(self, modules: Collection[str] = (), functions: Collection[str] = ()) -> tuple[tuple[str, ...], str]:
        """Name the wrapped functions for a receipt; see :meth:`~kl_plugins.patches.engine.patch.PatchSet.summary`."""
        from kl_plugins.patches.trl.hooks import PATCHES

        return PATCHES.summary(modules, functions)


HOOKS = ClassHooks()
