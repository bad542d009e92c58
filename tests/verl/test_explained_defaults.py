"""The defaults that ``kl-plugins explain --host verl`` assumes are those of the installed veRL."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.version import Version

from kl_plugins.adapters.verl.explained import FORMAT
from kl_plugins.adapters.verl.explained.defaults import NOT_IN_EVERY_CONFIG, ROLLOUT, defaults
from kl_plugins.settings import Unknown, read_words

spec = find_spec("verl")
assert spec is not None
assert spec.origin is not None
CONFIG = Path(spec.origin).parent / "trainer" / "config" / "_generated_ppo_trainer.yaml"


@pytest.mark.skipif(not CONFIG.is_file(), reason="this veRL has no resolved default config")
def test_defaults_are_verls_own() -> None:
    real = {setting.key: setting.value for setting in read_words([str(CONFIG)], FORMAT)}
    for key, assumed in defaults(Version(version("verl"))).items():
        if key not in (*NOT_IN_EVERY_CONFIG, f"{ROLLOUT}name"):
            assert real[key] == assumed or isinstance(real[key], Unknown), key
