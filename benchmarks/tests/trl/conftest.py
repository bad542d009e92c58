"""Tests in this folder run with TRL, in the environment that ``tests/support/trl/fixtures.py`` makes."""

from pathlib import Path

import pytest

pytest.importorskip("trl")


def pytest_configure(config: pytest.Config) -> None:
    # As a plugin, so that two folders in one run share what is made once per session.
    config.pluginmanager.import_plugin("tests.support.trl.fixtures")


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the study's briefly trained reference, of the task with the fewest completions."""
    from benchmarks.study import models
    from benchmarks.tests.trl.study_support import QUICK

    folder = tmp_path_factory.mktemp("reference")
    models.make_reference(folder, "sums", "llama", QUICK, lambda steps: None)
    return folder
