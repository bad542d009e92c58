"""The bundle alone carries the GPU stages: sent call by call, installed into an empty folder, run in smoke form."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trl

from benchmarks.gpu import bundle
from benchmarks.gpu.stages import STAGES

BROUGHT = (
    "kl_plugins", "kl_plugins.adapters", "kl_plugins.patches", "trl", "datasets", "dill", "multiprocess", "gguf",
    "liger_kernel", "verl", "benchmarks", "tests",
)  # fmt: skip
LOCATE = f"from importlib.util import find_spec; print(*(find_spec(n).origin for n in {BROUGHT}), sep='\\n')"
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        f"trl=={trl.__version__}" not in bundle.PINS, reason="the rest of this environment suits another TRL"
    ),
]


class Machine(NamedTuple):
    """Stands for the GPU machine: what is sent lies in folders of its own, and only WORK outlasts a call."""

    bundle: Path
    folder: Path

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        own = {"WORK": str(self.work), "OUT": str(self.folder / "results"), "PYTHON": sys.executable}
        return {**kept, **own, "OMP_NUM_THREADS": "1"}

    def call(self, stage: int) -> subprocess.CompletedProcess[str]:
        """Send what README.txt says and run the script; what was sent is gone afterwards."""
        call = next(call for call in bundle.CALLS if call.stage == stage)
        sent = self.folder / "sent"
        sent.mkdir()
        for name in (*bundle.SMALL, *call.sends):
            source = self.bundle / name
            if source.is_dir():
                shutil.copytree(source, sent / name)
            elif source.exists():
                shutil.copy(source, sent / name)
        try:
            return subprocess.run(
                ["bash", str(sent / call.script), "--smoke", "--device", "cpu"],
                cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
        finally:
            shutil.rmtree(sent)

    def record(self, stage: int) -> dict[str, Any]:
        """What the stage's packed results say."""
        with tarfile.open(self.folder / "results" / f"stage-{stage}.tgz") as packed:
            file = packed.extractfile(f"gpu/stage{stage}.json")
            assert file is not None
            return json.loads(file.read())


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A machine on which the first call has run."""
    made = tmp_path_factory.mktemp("bundle") / "gpu-bundle"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    try:
        bundle.make(made, python)
    except bundle.UnreachableError:
        try:
            bundle.make(made, python, with_model=False)
        except bundle.UnreachableError as error:
            pytest.skip(str(error))
    machine = Machine(made, tmp_path_factory.mktemp("machine"))
    check(machine, 1)
    return machine


def check(machine: Machine, stage: int) -> None:
    done = machine.call(stage)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    record = machine.record(stage)
    assert {name: record[name]["status"] for name in record if name != "machine"} == {
        step.name: 0 for step in STAGES[stage]
    }


@pytest.mark.timeout(1500)
def test_first_call_installs_everything_from_the_bundle(machine: Machine) -> None:
    paths = f"{machine.work / 'tree'}{os.pathsep}{machine.work / 'site'}"
    found = subprocess.check_output(
        [sys.executable, "-c", LOCATE],
        cwd=machine.work / "tree", env={**machine.environment, "PYTHONPATH": paths}, text=True,
    ).split()  # fmt: skip
    assert len(found) == len(BROUGHT)
    assert all(Path(origin).is_relative_to(machine.work) for origin in found), found
    with tarfile.open(machine.folder / "results" / "stage-1.tgz") as packed:
        names = packed.getnames()
        tests = packed.extractfile("gpu/tests.log")
        assert tests is not None
        assert "test_linear_gpu.py" in tests.read().decode()
    assert {"gpu/ceilings.json", "gpu/kernel-cpu-bfloat16-logits.json", "gpu/launches.json"} <= set(names)
    peers = json.loads((machine.work / "tree/out/bench/gpu/kernel-cpu-bfloat16-hidden.json").read_text())["peers"]
    assert {"trl": "1.16.0", "liger-kernel": "0.8.5", "verl": "0.9.1"}.items() <= peers.items()


@pytest.mark.timeout(1500)
def test_second_call_joins_the_model_and_trains(machine: Machine) -> None:
    check(machine, 2)
    if (machine.bundle / "model").exists():
        made = machine.work / "tree/out/models/smollm2-135m-instruct"
        assert (made / "model.safetensors").stat().st_size > 250e6  # bfloat16
    results = machine.work / "tree/out/bench/gpu"
    assert set(json.loads((results / "demo-llm/summary.json").read_text())["arms"]) == {"none", "default"}
    for name in ("trl-steps", "trl-steps-vocabulary"):
        assert not json.loads((results / name / "summary.json").read_text())["failed"]
    sharded = json.loads((results / "sharded/summary.json").read_text())["ways"]
    assert {row["verdict"] for rows in sharded.values() for row in rows.values()} == {"equal", "refused"}
    assert "refused" in {row["verdict"] for row in sharded["zero3"].values()}


@pytest.mark.timeout(1500)
def test_third_call_trains_on_stale_data_and_goes_on_when_it_is_made_again(machine: Machine) -> None:
    check(machine, 3)
    found = json.loads((machine.work / "tree/out/bench/gpu/staleness/summary.json").read_text())
    assert {(run["arm"], run["delay"]) for run in found["runs"]} == {
        (arm, delay) for arm in ("none", "default") for delay in (0, 1)
    }
    assert found["missing"] == []
    again = machine.call(3)
    assert again.returncode == 0
    assert "0 of 4 runs to be made" in again.stdout
