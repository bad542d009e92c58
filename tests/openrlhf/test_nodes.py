"""Receipts of workers on two Ray nodes; a node without kl-plugins stops the run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.openrlhf.ray_support import ENVIRONMENT, end_session

ROOT = Path(__file__).resolve().parents[2]
HIDING = """
import sys

import openrlhf_on_cpu


class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "kl_plugins":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Hidden())
openrlhf_on_cpu.install()
"""

pytestmark = pytest.mark.timeout(700)


def two_nodes(assets, tmp_path, *second, seconds=600):
    """Exit status, output and errors; nothing of the clusters survives."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.openrlhf.two_nodes", str(assets), *map(str, second)]
    streams = [tmp_path / "stdout", tmp_path / "stderr"]
    with streams[0].open("w") as stdout, streams[1].open("w") as stderr:
        process = subprocess.Popen(
            command, env={**os.environ, **ENVIRONMENT}, stdout=stdout, stderr=stderr, cwd=ROOT, start_new_session=True
        )
        try:
            status = process.wait(seconds)
        finally:
            end_session(process.pid)
            process.wait()
    return status, *(stream.read_text() for stream in streams)


@pytest.mark.full
def test_workers_on_two_nodes_give_receipts_and_train(assets, tmp_path):
    status, output, errors = two_nodes(assets, tmp_path)
    assert status == 0, errors[-3000:]
    assert "nodes 2" in output
    assert re.findall(r"receipt .* active in OpenRLHF \S+, rank (\d) of 2", output) == ["0", "1"]
    assert "trained 1.0" in output


def test_a_node_without_the_package_stops_the_run_with_a_reason(assets, tmp_path):
    folder = tmp_path / "second"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HIDING)
    status, output, errors = two_nodes(assets, tmp_path, folder)
    assert status != 0
    assert "trained" not in output
    assert "No module named 'kl_plugins" in errors, errors[-3000:]
