"""Tests in this folder run with veRL, in the environment that ``tests/support/verl/fixtures.py`` makes."""

from importlib.util import find_spec

import pytest

if find_spec("verl") is None:
    pytest.skip("veRL is not installed", allow_module_level=True)


def pytest_configure(config: pytest.Config) -> None:
    # As a plugin, so that two folders in one run share what is made once per session.
    config.pluginmanager.import_plugin("tests.support.verl.fixtures")
