"""Pytest plugin that runs TRL's own tests on the CPU, and attaches kl-plugins if ``KL_DOWNSTREAM`` requests it.

The environment variable ``KL_DOWNSTREAM`` holds a JSON object with four keys. ``attach`` says whether to attach
kl-plugins. ``specs`` maps each algorithm to the spec of every config whose beta is not 0. ``beta`` is the beta of every
GRPO config that leaves it at 0. ``only`` lists the tests to run; null runs all tests.
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
    """Deselect the tests that this run does not need."""
    if SETTINGS["only"] is not None:
        dropped = [item for item in items if _name(item) not in SETTINGS["only"]]
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Any:
    """Remember which test is running, so that notes about its beta and its spec go into its report."""
    running[:] = [item]
    return (yield)


def _name(item: pytest.Item) -> str:
    scope = getattr(item, "cls", None) or item.module
    return f"{scope.__name__.rpartition('.')[2]}::{item.name}"


def _note(key: str, value: object) -> None:
    # pytest writes the user properties of a test into the JUnit report.
    if running and (key, str(value)) not in running[0].user_properties:
        running[0].user_properties.append((key, str(value)))


def _train_on_cpu() -> None:
    # This patches the base class, because kl-plugins does not patch it, and because it runs after the defaults of TRL's
    # config.
    from transformers import TrainingArguments

    original = TrainingArguments.__post_init__

    def post_init(self: Any) -> None:
        self.use_cpu, self.bf16 = True, False
        original(self)

    TrainingArguments.__post_init__ = post_init


def _attach() -> None:
    from kl_plugins.adapters.trl import attach
    from kl_plugins.adapters.trl.session import KLCallback

    attach()
    begin = KLCallback.on_train_begin

    def on_train_begin(self: Any, *args: Any, **kwargs: Any) -> None:
        _note("kl", self.session.spec)
        begin(self, *args, **kwargs)

    KLCallback.on_train_begin = on_train_begin


def _change_defaults(config: type, algorithm: str) -> None:
    # This wrapper is the outermost one, so it acts before all other code, including the checks of kl-plugins.
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
