"""Environment and fixtures of all tests with veRL: CPU platform, offline, one Ray cluster of their own."""

import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.verl import ray_support
from tests.support.verl.ray_support import CPU_HOST, ENVIRONMENT, SINCE_0_9, WITHOUT_PLUGIN
from tests.support.verl.workers import Group

os.environ.update(ENVIRONMENT)
sys.path.append(str(CPU_HOST))
with warnings.catch_warnings():
    # Imported here, where the host may warn, and not while tests are collected, where a warning is an error.
    warnings.simplefilter("ignore")
    importlib.import_module("verl")
    importlib.import_module("verl.workers.engine_workers")
    importlib.import_module("verl.trainer.ppo.ray_trainer")
    if SINCE_0_9:
        importlib.import_module("verl.trainer.ppo.v1")

ROOT = Path(__file__).parents[3]
FOLDERS = (ROOT / "tests" / "verl", ROOT / "benchmarks" / "tests" / "verl")
"""Where the tests lie that run with the host."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(folder in item.path.parents for folder in FOLDERS):
            # The host's own warnings are the host's business; ours stay errors.
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            item.add_marker(pytest.mark.filterwarnings("error:kl-plugins"))


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.verl.assets import build

    return build(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    from tests.support import garbage
    from tests.support.verl import remote

    with ray_support.cluster(remote, garbage, cpus=32):
        yield


@pytest.fixture(scope="session")
def model(assets: Path) -> Any:
    """The policy that every group of workers starts from."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(assets / "model", attn_implementation="sdpa")


@pytest.fixture(scope="session")
def models(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, str]:
    """Policy and reference, and the folder of the reference. The policy is a copy, for gradients of its own."""
    from transformers import AutoModelForCausalLM

    def load(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")

    folder = tmp_path_factory.mktemp("reference")
    shutil.copytree(assets / "model", folder, dirs_exist_ok=True)
    reference = load(folder)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    reference.save_pretrained(folder)
    return load(assets / "model"), reference, str(folder)


@pytest.fixture(scope="session")
def single(assets: Path, cluster: None) -> Iterator[Group]:
    """One training worker, shared by all tests; sequences are packed."""
    made = Group(str(assets / "model"), 1, packed=True)
    yield made
    made.end()


@pytest.fixture(scope="session")
def pair(assets: Path, cluster: None) -> Iterator[Group]:
    """Two training workers, shared by all tests; sequences are padded."""
    made = Group(str(assets / "model"), 2, packed=False)
    yield made
    made.end()


@pytest.fixture(scope="session")
def stock(assets: Path, cluster: None) -> Iterator[Group]:
    """One training worker in a process without kl-plugins."""
    made = Group(str(assets / "model"), 1, packed=True, environment=WITHOUT_PLUGIN)
    yield made
    made.end()
