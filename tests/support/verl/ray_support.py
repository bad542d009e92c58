"""Ray for tests: the environment of every process, and clusters with ports and folders of their own."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from packaging.version import Version

CPU_HOST = Path(__file__).parent / "cpu_host"

SINCE_0_9 = find_spec("verl") is not None and Version(version("verl")).release >= (0, 9)
"""veRL has entry points, platforms and its v1 trainers; before, it is told of the plugin by name."""

ASYNCHRONOUS = find_spec("verl") is not None and Version(version("verl")) >= Version("0.9.1")
"""The asynchronous trainers of this version are run by the tests, and not refused."""

TRAINERS = ("v0", "v1") if SINCE_0_9 else ("v0",)

WITHOUT_PLUGIN = {"VERL_USE_EXTERNAL_PLUGINS": "none", "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu"}

ENVIRONMENT = {
    "PYTHONPATH": str(CPU_HOST),
    "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu" if SINCE_0_9 else "verl_on_cpu,kl_plugins.patches.verl.entry",
    "VERL_PLATFORM": "cpu",
    "VERL_ENGINE_DEVICE": "cuda",  # key of the engine classes, which run on any device
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HYDRA_FULL_ERROR": "1",
    "WANDB_MODE": "disabled",
}


@contextmanager
def cluster(*modules: ModuleType, cpus: int = 8) -> Iterator[None]:
    """A Ray cluster of this process alone; functions of the modules travel to its workers by value."""
    import ray

    folder = tempfile.mkdtemp(prefix="klp")  # Ray's sockets need a short path
    ray.init(
        address="local",
        num_cpus=cpus,  # counted, not used: several groups may stand at a time
        include_dashboard=False,
        object_store_memory=100_000_000,
        _temp_dir=folder,
        log_to_driver=False,
    )
    for module in modules:
        ray.cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


HIDING = """
import sys


class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "kl_plugins":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Hidden())
"""


def hide_package(folder: Path) -> Path:
    """Make a folder that, on the import path, hides kl-plugins from every Python process."""
    (folder / "sitecustomize.py").write_text(HIDING)
    return folder
