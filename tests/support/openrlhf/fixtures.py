"""Environment and fixtures of all tests with OpenRLHF: a CPU in place of GPUs, offline, one Ray cluster, its actors."""

import fcntl
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.openrlhf.ray_support import CPU_HOST, ENVIRONMENT, local_cluster

os.environ.update(ENVIRONMENT)
sys.path.append(str(CPU_HOST))
with warnings.catch_warnings():
    # Imported here, where the host may warn, and not while tests are collected, where a warning is an error.
    warnings.simplefilter("ignore")
    importlib.import_module("openrlhf_on_cpu").install()
    importlib.import_module("openrlhf.trainer.ppo_trainer_async")

ROOT = Path(__file__).parents[3]
FOLDERS = (ROOT / "tests" / "openrlhf", ROOT / "benchmarks" / "tests" / "openrlhf")
"""Where the tests lie that run with the host."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(folder in item.path.parents for folder in FOLDERS):
            # The host's own warnings are the host's business; ours stay errors.
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            item.add_marker(pytest.mark.filterwarnings("error:kl-plugins"))


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.openrlhf.assets import build

    return build(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="session")
def rollouts(assets: Path):
    """Fixed rollouts of 8 sequences with the sampler's log-probs; see ``harness.Rollouts`` for variations."""
    from tests.support.openrlhf.rollouts import make_rollouts

    return make_rollouts(assets / "model")


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A Ray job whose driver, this process, and whose workers all have kl-plugins attached."""
    with local_cluster(attached=True):
        yield


@pytest.fixture(scope="session")
def harness(assets: Path, cluster: None):
    """One policy and one reference actor, attached, for every test of the session."""
    from tests.support.openrlhf.harness import Harness

    return Harness(assets)


@pytest.fixture(scope="session")
def make_pair(assets: Path, cluster: None):
    """Gives two policy and two reference actors, attached, for every test of the session."""
    from tests.support.openrlhf.harness import Harness

    made: list[Harness] = []

    def pair() -> Harness:
        if not made or made[0].ended:
            made[:] = [Harness(assets, 2)]
        return made[0]

    return pair


@pytest.fixture
def pair(make_pair):
    """The actors of two ranks."""
    return make_pair()


@pytest.fixture
def packing(harness, monkeypatch: pytest.MonkeyPatch):
    """The harness with packing that runs on a CPU.

    flash-attn, which OpenRLHF packs with, needs a GPU. Here its helpers are transformers' own in plain torch, and
    attention is eager. Everything else is OpenRLHF's packing.
    """
    import ray

    from tests.support.openrlhf import by_hand
    from tests.support.openrlhf import harness as module
    from tests.support.openrlhf.command_line import parse

    ray.cloudpickle.register_pickle_by_value(by_hand)
    for ask in (harness.ask, harness.ask_reference):
        ask(by_hand.pack_without_flash_attention)

    def eager(*args, **kwargs):
        args = parse(*args, **kwargs)
        args.ds.attn_implementation = "eager"
        return args

    monkeypatch.setattr(module, "parse", eager)
    return harness


@pytest.fixture(scope="module", params=["ring attention", "tensor parallelism"])
def sharing(request: pytest.FixtureRequest, harness, tmp_path_factory: pytest.TempPathFactory):
    """Two policy and two reference actors that share each sequence, see ``tests.support.openrlhf.shared``."""
    from tests.support.openrlhf.shared import Sharing

    with Sharing(request.param, harness, tmp_path_factory.mktemp("shared")) as made:
        yield made


@pytest.fixture(scope="session")
def stock(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Metrics, parameters and gradient of OpenRLHF's own settings, from processes that never saw kl-plugins.

    The keys are those of ``harness.STOCK``. Where pytest runs in several processes, the first that needs it makes it
    for all: their models are the same, bit by bit.
    """
    import torch

    from tests.support.openrlhf.harness import STOCK

    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    output = folder / "stock.pt"
    with (folder / "stock.lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if not output.exists():
            command = [sys.executable, "-W", "ignore", "-m", "tests.support.openrlhf.harness", str(assets), str(output)]
            variables = {**os.environ, **ENVIRONMENT}
            result = subprocess.run(
                command, input=json.dumps(STOCK), env=variables, cwd=ROOT, capture_output=True, text=True, timeout=420
            )
            assert result.returncode == 0, result.stderr[-4000:]
    return torch.load(output)
