"""Environment and fixtures of all tests with TRL: offline, quiet, TRL's own classes restored after each test."""

import importlib
import os
import warnings

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRANSFORMERS_VERBOSITY="error",
    TRL_EXPERIMENTAL_SILENCE="1",
    ACCELERATE_USE_CPU="1",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest

with warnings.catch_warnings():
    # Imported here, where the host may warn, and not while tests are collected, where a warning is an error.
    warnings.simplefilter("ignore")
    importlib.import_module("trl.trainer.grpo_trainer")

ROOT = Path(__file__).parents[3]
FOLDERS = (ROOT / "tests" / "trl", ROOT / "benchmarks" / "tests" / "trl")
"""Where the tests lie that run with the host."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(folder in item.path.parents for folder in FOLDERS):
            # The host's own warnings are the host's business; ours stay errors.
            item.add_marker(pytest.mark.filterwarnings("default"))
            item.add_marker(pytest.mark.filterwarnings("error:kl-plugins"))
            item.add_marker(pytest.mark.timeout(300))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tests.support.trl.trainers import build_model

    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _detached():
    """No test may depend on an earlier one having attached in place."""
    from kl_plugins.adapters.trl import detach

    yield
    detach()
