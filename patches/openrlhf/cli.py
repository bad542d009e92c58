"""Hooks in the launching process: the flag, the check of all arguments, and vLLM engines that keep log-probs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import wrapt

from kl_plugins.adapters.openrlhf import flag, guards, settings
from kl_plugins.adapters.openrlhf.host import ESTIMATOR_FLAG
from kl_plugins.patches.arguments import Function, replaced
from kl_plugins.spec import KLSpec

_launched: list[Any] = []
"""The arguments of this process's run; OpenRLHF does not pass them to what makes its engines."""


@contextmanager
def extended_flag() -> Iterator[None]:
    """Within the block, parsers that define the estimator flag accept specs for it."""
    owner: Any = argparse._ActionsContainer
    original = owner.add_argument
    owner.add_argument = wrapt.FunctionWrapper(original, _add_argument)
    try:
        yield
    finally:
        owner.add_argument = original


def _add_argument(wrapped: Function, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if ESTIMATOR_FLAG in args and kwargs.get("choices"):
        kwargs = flag.extended(kwargs)
    return wrapped(*args, **kwargs)


def checked(args: Any) -> KLSpec | None:
    """The arguments' spec, after every check that needs no model and no Ray; None for OpenRLHF's own estimators.

    Raises:
        KLSpecError: a text is not a valid spec.
        ValueError: a spec and other settings contradict each other.
        UnsupportedHostError: this OpenRLHF, or a part of it that the arguments pick, was not checked.
    """
    spec = guards.checked(args)
    if spec is not None:
        from kl_plugins.patches.openrlhf import support

        support.check_process()
        support.check_sources()
        support.check_parts(args)
    return spec


def hierarchize(wrapped: Function, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around the step from flat to nested arguments, right after parsing and before Ray: a mistake costs seconds."""
    nested = wrapped(*args, **kwargs)
    _launched.clear()
    if hasattr(getattr(nested, "algo", None), "kl"):
        checked(nested)
        _launched.append(nested)
    return nested


def create_vllm_engines(wrapped: Function, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Around the start of vLLM: engines have to be told at their start that log-probs will be asked for."""
    if _launched and settings.needs_sampler(_launched[0]):
        args, kwargs = replaced(wrapped, args, kwargs, logprobs_mode="processed_logprobs")
    return wrapped(*args, **kwargs)
