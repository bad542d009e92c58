"""Which OpenRLHF is accepted: by version and by the source of every wrapped function, wherever a spec is used."""

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import openrlhf
import pytest
from packaging.specifiers import SpecifierSet

from kl_plugins.adapters.openrlhf import HOST, attach, diagnose
from kl_plugins.adapters.versions import UnsupportedHostError
from kl_plugins.patches.engine.fingerprint import fingerprints_in_folder
from kl_plugins.patches.openrlhf import HOOKS
from tests.support.openrlhf.ray_support import ENVIRONMENT

FOLDER = Path(openrlhf.__file__).parent
STEP = "openrlhf.trainer.ray.ppo_actor:ActorPPOTrainer.training_step"
VERSIONS = ("0.10.2", "0.10.3", "0.10.4", "0.11.0", "0.11.1", "0.11.2")


@pytest.fixture(autouse=True)
def attached():
    attach()


def test_the_range_and_the_table_agree():
    assert [v for v in VERSIONS if SpecifierSet(HOST.supported).contains(v)] == list(VERSIONS)
    assert not SpecifierSet(HOST.supported).contains("0.10.1.post2")
    assert not SpecifierSet(HOST.supported).contains("0.11.3")
    for name, digests in HOOKS.sources.checked.items():
        assert next(iter(digests)) == VERSIONS[0], name
        assert set(digests) <= set(VERSIONS), name
        assert len(set(digests.values())) == len(digests), name


def test_the_installed_sources_are_known():
    for name, digest in fingerprints_in_folder(FOLDER, HOOKS.sources.checked).items():
        assert digest in HOOKS.sources.checked[name].values(), name
    HOOKS.sources.check()


@pytest.mark.parametrize("version", ["0.10.1.post2", "0.11.3", "0.12.0"])
def test_other_versions_are_refused(monkeypatch, version):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version if name == "openrlhf" else real(name))
    with pytest.raises(UnsupportedHostError, match=rf"openrlhf {version} is not among .*KL_PLUGINS_ALLOW_UNTESTED=1"):
        HOOKS.check_process()
    monkeypatch.setenv("KL_PLUGINS_ALLOW_UNTESTED", "1")
    with pytest.warns(RuntimeWarning, match="going on because"):
        HOOKS.check_process()


PROGRAM = """
import json
from kl_plugins.adapters.openrlhf import attach, diagnose
attach()
found = {"faults": [finding.subject for finding in diagnose() if finding.level == "fault"]}
import openrlhf.trainer.ray.ppo_actor
from kl_plugins.patches.openrlhf import HOOKS
for name, check in (("process", HOOKS.check_process), ("sources", HOOKS.sources.check)):
    try:
        check()
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


def in_copy(tmp_path, edit):
    """What a new process says of a copy of OpenRLHF whose training step's module was edited."""
    copy = tmp_path / "openrlhf"
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / "trainer" / "ray" / "ppo_actor.py"
    path.write_text(edit(path.read_text()))
    variables = {**os.environ, **ENVIRONMENT, "PYTHONPATH": f"{tmp_path}:{ENVIRONMENT['PYTHONPATH']}"}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


def test_an_edited_source_is_refused_in_the_launcher_and_in_the_worker(tmp_path):
    found = in_copy(tmp_path, lambda text: text.replace("kl_loss * kl_ctl", "kl_loss * kl_ctl * 0"))
    assert found["faults"] == [f"openrlhf {metadata.version('openrlhf')} {STEP}"]
    for check in ("process", "sources"):
        assert "UnsupportedHostError" in found[check]
        assert "ActorPPOTrainer.training_step" in found[check]


def test_comments_and_layout_do_not_matter(tmp_path):
    def edit(text):
        return text.replace("        # loss function\n", "        # another comment\n\n")

    assert in_copy(tmp_path, edit) == {"faults": []}


def test_doctor_finds_nothing_wrong_with_the_installed_one():
    assert {finding.level for finding in diagnose()} == {"ok"}
