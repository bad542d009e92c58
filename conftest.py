"""Options and markers that every test folder shares."""

from importlib.util import find_spec

import pytest
from hypothesis import settings

# The machines that run these tests are shared: a slow example says nothing about the code.
settings.register_profile("kl-plugins", deadline=None)
settings.load_profile("kl-plugins")

LONGEST = (
    "test_demo.py",
    "test_two_processes.py",
    "test_receipts.py",
    "test_contract.py",
    "test_main_ppo.py",
    "test_cli.py",
    "test_nodes.py",
    "test_refusals.py",
    "test_study.py",
    "test_stock.py",
    "test_verls_own_tests.py",
    "test_openrlhfs_own_tests.py",
    "test_bench_hosts.py",
    "test_sharded.py",
    "test_doctor.py",
    "test_backends.py",
)
"""Files that take longest, in all folders. They come first: of two processes, none works long alone at the end."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the tests marked full too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full")])
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    for item in items:
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("vllm") and not find_spec("vllm"):
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
