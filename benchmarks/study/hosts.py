"""The frameworks that the study can train in. A new one needs an entry here and a function like `trl_host.run`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

Run = Callable[..., dict[str, Any]]
"""`run(cell, seed, settings, reference_folder, tick)`, as in `trl_host`."""

BUILT = {name: f"benchmarks.study.{name}_host" for name in ("trl", "verl", "openrlhf")}


def find_host(name: str) -> Run:
    """Return the function that trains a cell in this host.

    Raises:
        ValueError: if the study does not know the host, or the host is not installed here.
    """
    if name not in BUILT:
        raise ValueError(f"no host {name!r}; there is {', '.join(BUILT)}")
    if find_spec(name) is None:
        raise ValueError(f"{name} is not installed here; benchmarks/README.md says which environment has it")
    run: Run = import_module(BUILT[name]).run
    return run


def train(cell: Any, *arguments: Any) -> dict[str, Any]:
    """Train a cell in its host. Worker processes call this function."""
    return find_host(cell.host)(cell, *arguments)
