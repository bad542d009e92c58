"""veRL's own PPO and protocol tests, which its wheel brings along: the same tests pass with the plugin as without."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support.verl.ray_support import SINCE_0_9

SUITES = ("tests/trainer/ppo", "tests/test_protocol_on_cpu.py", "tests/test_base_config_on_cpu.py")


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """The tests alone, away from this repository and from site-packages."""
    folder = tmp_path_factory.mktemp("verl_suite")
    for file in distribution("verl").files or ():
        if file.parts[0] == "tests" and file.suffix == ".py":
            target = folder.joinpath(*file.parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(file.locate()), target)
    return folder


def outcomes(folder: Path, plugins: str) -> dict[str, str]:
    """Outcome of each test, by name."""
    report = folder / f"report-{plugins}.xml"
    hidden = ("PYTHONPATH", "VERL_PLATFORM", "VERL_ENGINE_DEVICE", "VERL_USE_EXTERNAL_MODULES", "PYTEST_ADDOPTS")
    variables = {name: value for name, value in os.environ.items() if name not in hidden}
    variables["VERL_USE_EXTERNAL_PLUGINS"] = plugins
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *SUITES]
    result = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=500)
    assert report.exists(), result.stdout[-3000:] + result.stderr[-3000:]
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        tags = {child.tag for child in case} & {"failure", "error", "skipped"}
        found[f"{case.get('classname')}.{case.get('name')}"] = tags.pop() if tags else "passed"
    return found


def test_verls_own_tests_pass_with_the_plugin_as_without(suite):
    with_plugin, without = outcomes(suite, "kl_plugins"), outcomes(suite, "none")
    assert with_plugin == without
    assert list(with_plugin.values()).count("passed") > (150 if SINCE_0_9 else 120)
    if SINCE_0_9:  # on 0.8 some fail here, with the plugin and without
        assert "failure" not in with_plugin.values()
        assert "error" not in with_plugin.values()
