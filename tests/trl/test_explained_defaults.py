"""The defaults that ``kl-plugins explain --host trl`` assumes are those of the installed TRL."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from typing import Any

import pytest
import trl
from packaging.version import Version

from kl_plugins.adapters.trl.explained.defaults import NOT_OF_THE_CONFIG, RULES, defaults


def fields(config: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(config)}


@pytest.mark.parametrize(("algorithm", "config"), [("GRPO", trl.GRPOConfig), ("RLOO", trl.RLOOConfig)])
def test_defaults_are_trls_own(algorithm: str, config: type) -> None:
    real = fields(config)
    for key, assumed in defaults(algorithm, Version(version("trl"))).items():
        if key not in NOT_OF_THE_CONFIG and assumed is not None:
            assert real[key] == assumed, key


def test_every_loss_type_of_trl_is_known() -> None:
    text = {field.name: field for field in dataclasses.fields(trl.GRPOConfig)}["loss_type"].metadata["help"]
    assert {name for name in RULES if f"'{name}'" in text or f"`{name}`" in text or name in text} == set(RULES)
