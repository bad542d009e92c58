"""OpenRLHF's own tests, which its wheel brings along: the same tests pass with the hooks in the code they test."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.openrlhf.ray_support import CPU_HOST, ENVIRONMENT

PLUGIN = Path(__file__).parent / "own_tests"


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


def outcomes(folder: Path, *options: str) -> tuple[dict[str, str], str]:
    """Outcome of each test, by name, and what pytest printed."""
    report = folder / f"report{len(options)}.xml"
    path = os.pathsep.join([str(CPU_HOST), str(PLUGIN)])
    variables = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path}
    variables.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    result = subprocess.run(
        [*command, f"--junitxml={report}", "tests"],
        cwd=folder, env=variables, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert report.exists(), result.stdout[-3000:] + result.stderr[-3000:]
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        tags = {child.tag for child in case} & {"failure", "error", "skipped"}
        found[f"{case.get('classname')}.{case.get('name')}"] = tags.pop() if tags else "passed"
    return found, result.stdout


def test_openrlhfs_own_tests_pass_with_the_hooks_as_without(suite):
    without, _ = outcomes(suite)
    hooked, output = outcomes(suite, "-p", "hooks_in_copies")
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
