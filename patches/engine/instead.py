"""Replace a method of one object for a while, where a class may be one of the host's or one of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def instead(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Within the block, an object calls another function by one of its names.

    The function is set on the object itself, so that it also replaces a method of a subclass.

    Args:
        owner: the object.
        name: of its method. If the object itself held a function by this name, it holds the same afterwards.
        function: is called with the arguments of the method, without the object.
    """
    held = name in vars(owner)
    own = vars(owner).get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        if held:
            setattr(owner, name, own)
        else:
            delattr(owner, name)
