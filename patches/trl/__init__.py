"""Where kl-plugins goes into TRL: ``attach`` patches TRL's classes in place, ``classes`` holds hooked subclasses."""

from __future__ import annotations


def attach() -> None:
    """Put the ``kl`` field and the hooks into TRL's own classes. Safe to call twice.

    Raises:
        UnsupportedHostError: this TRL is not one that kl-plugins was checked with, or Unsloth has rewritten it; nothing
            is changed then.
    """
    from kl_plugins.adapters.trl import unsloth

    unsloth.refuse("attach() cannot put its hooks into TRL")
    from kl_plugins.patches.trl.targets import FIELDS, IN_PLACE

    if all(patches.active for patches in IN_PLACE):
        return
    for patches in IN_PLACE:
        patches.check()
    for field in FIELDS:
        field.apply()
    for patches in IN_PLACE:
        patches.apply()


def detach() -> None:
    """Restore TRL's original objects. Safe to call twice.

    Raises:
        RuntimeError: somebody wrapped a hook again.
    """
    from kl_plugins.patches.trl.targets import FIELDS, IN_PLACE

    for patches in reversed(IN_PLACE):
        patches.undo()
    for field in reversed(FIELDS):
        field.undo()
