"""Tests in this folder run with TRL, in the environment that ``tests/support/trl/fixtures.py`` makes."""

import pytest

pytest.importorskip("trl")


def pytest_configure(config: pytest.Config) -> None:
    # As a plugin, so that two folders in one run share what is made once per session.
    config.pluginmanager.import_plugin("tests.support.trl.fixtures")
