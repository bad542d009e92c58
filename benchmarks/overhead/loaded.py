"""Keep what belongs to an arm in OpenRLHF's actors, and resume it later. Ray's workers get these functions by value.

An actor holds its model, optimizer and trainer in its attributes. Each start of the harness replaces them. So an
earlier start can be resumed by putting its attributes back.
"""

from __future__ import annotations

from typing import Any

ATTRIBUTE = "_kl_plugins_benchmark"
"""Attribute of an actor that holds the attributes of its arms."""


def keep(process: Any, arm: tuple[str, bool]) -> None:
    """Remember the attributes of an actor.

    Args:
        process: the Ray actor's object.
        arm: the pair's spec, and whether the spec trains.
    """
    held = vars(process)
    held.setdefault(ATTRIBUTE, {})[arm] = {name: value for name, value in held.items() if name != ATTRIBUTE}


def resume(process: Any, arm: tuple[str, bool]) -> None:
    """Put the attributes back that :func:`keep` remembered.

    Args:
        process, arm: as in :func:`keep`.
    """
    vars(process).update(vars(process)[ATTRIBUTE][arm])
