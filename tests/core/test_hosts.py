"""Host descriptors: plain data that the command line finds by entry point."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from kl_plugins.hosts import Finding, Host, installed_hosts

DESCRIPTOR = Host(
    name="a-host",
    distribution="pytest",
    packages=("pytest",),
    supported=">=7",
    tested=("8.0",),
    keys={"loss": "kl"},
    module="json",
)


def test_a_descriptor() -> None:
    assert DESCRIPTOR.installed_version() == pytest.__version__
    assert DESCRIPTOR.load().__name__ == "json"  # type: ignore[attr-defined]
    assert hash(DESCRIPTOR) == hash(DESCRIPTOR)
    absent = Host("x", "no-such-distribution-of-ours", ("x",), ">=1", (), {}, "no_such_module_of_ours")
    assert absent.installed_version() is None
    with pytest.raises(ModuleNotFoundError, match="no_such_module_of_ours"):
        absent.load()


def test_a_finding_needs_no_remedy() -> None:
    assert Finding("ok", "torch", "2.13").remedy == ""


@pytest.mark.parametrize("name", sorted(installed_hosts()))
def test_installed_descriptors_are_complete(name: str) -> None:
    host = installed_hosts()[name]
    assert host.name == name
    assert set(host.keys) <= {"loss", "reward", "advantage"}
    supported = SpecifierSet(host.supported)
    assert host.tested
    assert all(Version(version) in supported for version in host.tested)
    assert host.packages


def test_another_package_adds_a_host(tmp_path: Path) -> None:
    info = tmp_path / "their_host-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-host\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kl_plugins.hosts]\ntheirs = their_host:HOST\n")
    (tmp_path / "their_host.py").write_text(
        "from kl_plugins.hosts import Host\n"
        "HOST = Host('theirs', 'their-host', ('their_host',), '>=1', ('1.0',), {'loss': 'kl'}, 'their_host')\n"
    )
    code = (
        "import sys; from kl_plugins.hosts import installed_hosts; host = installed_hosts()['theirs']\n"
        "print(host.installed_version(), host.load().__name__, 'torch' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["1.0", "their_host", "False"], done.stderr
