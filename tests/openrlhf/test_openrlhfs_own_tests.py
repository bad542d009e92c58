"""OpenRLHF's own tests, which its wheel brings along: the same tests pass with the hooks in the code they test."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support.openrlhf.ray_support import CPU_HOST, ENVIRONMENT

PLUGIN = CPU_HOST.with_name("own_tests")


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """The tests beside the sources that they load by path, away from this repository and from site-packages."""
    folder = tmp_path_factory.mktemp("openrlhf_suite")
    for file in distribution("openrlhf").files or ():
        if file.parts[0] in ("tests", "openrlhf") and file.suffix == ".py":
            target = folder.joinpath(*file.parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(file.locate()), target)
    return folder


def start(folder: Path, name: str, *options: str) -> subprocess.Popen[bytes]:
    """Start the suite in a process of its own; it leaves ``NAME.xml`` and ``NAME.txt``."""
    variables = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(CPU_HOST), str(PLUGIN)])}
    variables.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={name}.xml", *options]
    with (folder / f"{name}.txt").open("wb") as output:
        return subprocess.Popen([*command, "tests"], cwd=folder, env=variables, stdout=output, stderr=subprocess.STDOUT)


def outcomes(folder: Path, name: str) -> dict[str, str]:
    """Outcome of each test, by name."""
    report = folder / f"{name}.xml"
    assert report.exists(), (folder / f"{name}.txt").read_text()[-5000:]
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        tags = {child.tag for child in case} & {"failure", "error", "skipped"}
        found[f"{case.get('classname')}.{case.get('name')}"] = tags.pop() if tags else "passed"
    return found


def test_openrlhfs_own_tests_pass_with_the_hooks_as_without(suite):
    runs = [start(suite, "without"), start(suite, "hooked", "-p", "hooks_in_copies")]
    try:
        for run in runs:
            run.wait(500)
    finally:
        for run in runs:
            run.kill()
            run.wait()
    without, hooked = outcomes(suite, "without"), outcomes(suite, "hooked")
    output = (suite / "hooked.txt").read_text()
    assert hooked == without, output[-4000:]
    assert list(without.values()).count("passed") > 200
    assert set(without.values()) == {"passed"}
    for expected in (
        "hooks in utils.py: compute_approx_kl",
        "RemoteExperienceMaker.compute_advantages_and_returns",
        "BasePPOTrainer.train_step",
        "SamplesGenerator._process_response_into_experience",
        "SingleTurnAgentExecutor.execute",
    ):
        assert expected in output
