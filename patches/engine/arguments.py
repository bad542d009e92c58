"""The arguments of a wrapped call by name, whichever way the host passes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

Function = Callable[..., Any]


def arguments(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return what a function is called with, by name, defaults included. The result is for reading, not for calling.

    Ray gives the methods of its actors a signature with parameters that the functions do not have.

    Args:
        function: has no positional-only parameters.
        args: positional arguments.
        kwargs: keyword arguments.
    """
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def replaced(
    function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], **changes: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the same call with other values for some arguments; everything else is passed as it was.

    Args:
        function: has no positional-only parameters.
        args: positional arguments.
        kwargs: keyword arguments.
        **changes: new values by name.

    Returns:
        Positional and keyword arguments.
    """
    positions = {name: index for index, name in enumerate(inspect.signature(function).parameters)}
    positional, named = list(args), dict(kwargs)
    for name, value in changes.items():
        if positions[name] < len(positional):
            positional[positions[name]] = value
        else:
            named[name] = value
    return tuple(positional), named
