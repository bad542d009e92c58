"""The arguments of a wrapped call by name, whatever way the host passes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

Function = Callable[..., Any]


def arguments(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a function is called with, by name, defaults included.

    Args:
        function: without positional-only or variadic parameters.
        args: positional arguments.
        kwargs: keyword arguments.
    """
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)
