"""Pytest plugin for TRL's own tests: on the CPU, and with kl-plugins attached where ``KL_DOWNSTREAM`` says so.

``KL_DOWNSTREAM`` holds JSON: ``attach``; ``specs``, from algorithm to the spec of every config whose beta is not 0;
``beta``, for every GRPO config that leaves it 0; ``only``, the tests to run.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

SETTINGS: dict[str, Any] = json.loads(os.environ["KL_DOWNSTREAM"])
running: list[pytest.Item] = []


def pytest_configure(config: pytest.Config) -> None:
    """Prepare TRL before any test module imports it."""
    import trl

    _train_on_cpu()
    if SETTINGS["attach"]:
        _attach()
    for algorithm in ("GRPO", "RLOO"):
        _change_defaults(getattr(trl, f"{algorithm}Config"), algorithm)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that this run is about."""
    if SETTINGS["only"] is not None:
        dropped = [item for item in items if _name(item) not in SETTINGS["only"]]
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Any:
    """Remember the test, for the note that it trained under a spec."""
    running[:] = [item]
    return (yield)


def _name(item: pytest.Item) -> str:
    scope = getattr(item, "cls", None) or item.module
    return f"{scope.__name__.rpartition('.')[2]}::{item.name}"


def _note(key: str, value: object) -> None:
    # Into the JUnit report.
    if running and (key, str(value)) not in running[0].user_properties:
        running[0].user_properties.append((key, str(value)))


def _train_on_cpu() -> None:
    # In the base class, which kl-plugins does not touch, and after TRL's config has chosen its defaults.
    from transformers import TrainingArguments

    original = TrainingArguments.__post_init__

    def post_init(self: Any) -> None:
        self.use_cpu, self.bf16 = True, False
        original(self)

    TrainingArguments.__post_init__ = post_init


def _attach() -> None:
    from kl_plugins.adapters.trl import attach
    from kl_plugins.adapters.trl.callback import KLCallback

    attach()
    begin = KLCallback.on_train_begin

    def on_train_begin(self: Any, *args: Any, **kwargs: Any) -> None:
        _note("kl", self.session.spec)
        begin(self, *args, **kwargs)

    KLCallback.on_train_begin = on_train_begin


def _change_defaults(config: type, algorithm: str) -> None:
    # Around everything else, kl-plugins' own check included.
    original: Any = config.__post_init__

    def post_init(self: Any) -> None:
        if self.beta == 0 and algorithm == "GRPO":
            self.beta = SETTINGS["beta"]
        if self.beta != 0:
            _note("beta", self.beta)
            if algorithm in SETTINGS["specs"] and self.kl is None:
                self.kl = SETTINGS["specs"][algorithm]
        original(self)

    config.__post_init__ = post_init
