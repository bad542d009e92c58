"""How ``kl-plugins run`` starts a job: the estimator flag accepts specs, and Ray calls our hook in every worker.

OpenRLHF's program calls ``ray.init`` with a runtime environment. Ray merges it with the job's own, which an environment
variable holds. So that is where the hook goes.
"""

from __future__ import annotations

import argparse
import json
import os
from argparse import ArgumentTypeError
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from kl_plugins.adapters.base import parse, parse_observation
from kl_plugins.adapters.openrlhf import ESTIMATOR_FLAG
from kl_plugins.spec import KLSpecError, looks_like_spec
from kl_plugins.spec.observation import looks_like_observation

HOOK = "kl_plugins.adapters.openrlhf.attach"
"""What every worker process of the job calls before anything else."""

VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Where ``ray job submit`` leaves the job's runtime environment for its driver."""

FIELD = "worker_process_setup_hook"

PREFIX = "KL_PLUGINS_"
"""Prefix of our environment variables; workers on any node get those of the launching process."""

OWN_HOOK = "KL_PLUGINS_OWN_SETUP_HOOK"
"""Environment variable: set to 1, the job's own hook is left alone, because it calls ours."""

HELP = (
    "kl-plugins: or a KL spec, <estimator>@<placement>[/<option>[:<value>]]..., for example k2@loss/is:token, or a "
    "preset such as default; @loss needs --algo.kl.use_loss, @reward and @advantage forbid it. k3/observe, or "
    "k3/observe:SPEC, trains with k3 as OpenRLHF alone does, and measures. `kl-plugins explain SPEC` says which "
    "gradient it has, `kl-plugins list` what there is."
)


@contextmanager
def launching() -> Iterator[None]:
    """Within the block, OpenRLHF's parser accepts specs, and a Ray job that is started calls the hook in its workers.

    Raises:
        ValueError: the job has another hook already, and Ray takes one.
    """
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = with_hook(os.environ)
    try:
        with extended_flag():
            yield
    finally:
        os.environ.pop(VARIABLE) if before is None else os.environ.update({VARIABLE: before})


def with_hook(environment: Mapping[str, str]) -> str:
    """Return the job config of an environment, with the hook and our own variables in it. Safe to apply twice.

    Args:
        environment: of the process that will call ``ray.init``.

    Returns:
        JSON for :data:`VARIABLE`.

    Raises:
        ValueError: the job has another hook already, and Ray takes one.
    """
    config = json.loads(environment.get(VARIABLE) or "{}")
    runtime = config.get("runtime_env") or {}
    found = runtime.get(FIELD)
    if found not in (None, HOOK):
        if environment.get(OWN_HOOK) == "1":
            return json.dumps(config)
        raise ValueError(
            f"kl-plugins: the Ray job's runtime environment has a {FIELD} already ({found}), and Ray takes one. Remove "
            f"it, or call {HOOK}() in it and set {OWN_HOOK}=1; a worker that it does not reach stops the run"
        )
    ours = {name: value for name, value in environment.items() if name.startswith(PREFIX)}
    if ours:
        runtime = {**runtime, "env_vars": {**ours, **(runtime.get("env_vars") or {})}}
    return json.dumps({**config, "runtime_env": {**runtime, FIELD: HOOK}})


@contextmanager
def extended_flag() -> Iterator[None]:
    """Within the block, parsers that define the estimator flag accept specs for it."""
    owner: Any = argparse._ActionsContainer
    original = owner.add_argument

    def add_argument(parser: Any, *names: Any, **options: Any) -> Any:
        if ESTIMATOR_FLAG in names and options.get("choices"):
            options = extended(options)
        return original(parser, *names, **options)

    owner.add_argument = add_argument
    try:
        yield
    finally:
        owner.add_argument = original


def extended(options: dict[str, Any]) -> dict[str, Any]:
    """Add specs to the keyword arguments of the flag's ``add_argument``.

    Args:
        options: what OpenRLHF passes; needs ``choices``.
    """
    text = f"{options.get('help', '')} {HELP}".strip()
    metavar = "{" + ",".join([*options["choices"], "SPEC"]) + "}"
    return {**options, "type": estimator, "choices": Choices(options["choices"]), "help": text, "metavar": metavar}


class Choices(Sequence[str]):
    """OpenRLHF's own estimators, and every spec."""

    def __init__(self, native: Sequence[str]) -> None:
        """Keep the host's list; it is what usage and errors show."""
        self.native = tuple(native)

    def __contains__(self, text: object) -> bool:
        return text in self.native or looks_like_spec(text) or looks_like_observation(text)

    def __iter__(self) -> Iterator[str]:
        yield from self.native
        yield "a KL spec such as k2@loss"

    def __len__(self) -> int:
        return len(self.native) + 1

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]


def estimator(text: str) -> str:
    """Check the flag's text, as argparse's type of the flag.

    Returns:
        The text itself.

    Raises:
        ArgumentTypeError: the text is a bad spec; says which part, what was expected, the nearest valid word.
    """
    if looks_like_spec(text) or looks_like_observation(text):
        try:
            _ = parse_observation(text) if looks_like_observation(text) else parse(text)
        except KLSpecError as error:
            raise ArgumentTypeError(str(error)) from None
    return text
