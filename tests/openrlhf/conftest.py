"""Tests in this folder run with OpenRLHF, in the environment that ``tests/support/openrlhf/fixtures.py`` makes."""

from importlib.util import find_spec

import pytest

if find_spec("openrlhf") is None:
    pytest.skip("OpenRLHF is not installed", allow_module_level=True)


def pytest_configure(config: pytest.Config) -> None:
    # As a plugin, so that two folders in one run share what is made once per session.
    config.pluginmanager.import_plugin("tests.support.openrlhf.fixtures")
