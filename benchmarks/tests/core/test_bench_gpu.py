"""The GPU stages as data, the runner that works through them, and the bundle for a machine without a network."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks.gpu import __main__ as runner
from benchmarks.gpu import bundle
from benchmarks.gpu.calls import needed
from benchmarks.gpu.stages import STAGE_MINUTES, STAGES, Step

GOOD, BAD = ("-c", "print('went well')"), ("-c", "raise SystemExit(3)")
ROOT = Path(__file__).parents[3]


def all_steps() -> list[Step]:
    return [step for steps in STAGES.values() for step in steps]


def test_stages_are_well_formed() -> None:
    assert list(STAGES) == [1, 2, 3]
    names = [step.name for step in all_steps()]
    assert len(set(names)) == len(names)
    for step in all_steps():
        assert 0 < step.minutes <= STAGE_MINUTES <= 8
        for command in (step.command, step.smoke):
            assert command[0] == "-m"
            if command[1] != "pytest":
                assert find_spec(command[1]) is not None
                assert command[command.index("--out") + 1].startswith("{out}")
                assert "{device}" in command


def test_smoke_is_not_the_real_thing() -> None:
    for step in all_steps():
        assert set(step.smoke) - set(step.command)


@pytest.mark.parametrize("stage", [2, 3])
def test_steps_with_a_model_fit_into_their_stage(stage: int) -> None:
    assert sum(step.minutes for step in STAGES[stage]) <= STAGE_MINUTES
    for step in STAGES[stage]:
        own = [
            float(after) for before, after in zip(step.command, step.command[1:], strict=False) if before == "--minutes"
        ]
        assert all(minutes < step.minutes for minutes in own)


def go(monkeypatch: pytest.MonkeyPatch, out: Path, *steps: Step, **options: Any) -> tuple[int, dict[str, Any]]:
    """Run steps as a stage; its exit status and its record."""
    monkeypatch.setattr(runner, "card", dict)
    monkeypatch.setitem(STAGES, 9, steps)
    arguments: dict[str, Any] = {"device": "cpu", "minutes": 8.0, "only": "", "smoke": False, **options}
    with pytest.raises(typer.Exit) as end:
        runner.main(9, out, **arguments)
    file = out / "stage9.json"
    return end.value.exit_code, json.loads(file.read_text()) if file.exists() else {}


def test_a_step_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steps = Step("bad", BAD, BAD, 1), Step("good", GOOD, GOOD, 1)
    status, record = go(monkeypatch, tmp_path, *steps)
    assert status == 1
    assert (record["bad"]["status"], record["good"]["status"]) == (3, 0)
    assert (tmp_path / "good.log").read_text() == "went well\n"
    assert record["machine"]["torch"]


def test_finished_steps_are_kept_and_failed_ones_run_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = tmp_path / "flag"
    second = ("-c", f"import pathlib; raise SystemExit(not pathlib.Path({str(flag)!r}).exists())")
    steps = Step("good", GOOD, GOOD, 1), Step("later", second, second, 1)
    assert go(monkeypatch, tmp_path, *steps)[0] == 1
    first = json.loads((tmp_path / "stage9.json").read_text())["good"]
    flag.touch()
    status, record = go(monkeypatch, tmp_path, *steps)
    assert status == 0
    assert record["good"] == first
    assert record["later"]["status"] == 0
    assert "good: there already" in capsys.readouterr().out


def test_a_smoke_run_does_not_stand_for_a_real_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    step = Step("good", GOOD, ("-c", "print('small')"), 1)
    assert "small" in go(monkeypatch, tmp_path, step, smoke=True)[1]["good"]["command"]
    assert "went well" in go(monkeypatch, tmp_path, step)[1]["good"]["command"]


def test_a_step_that_goes_on_is_started_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "lines"
    command = ("-c", f"print('x', file=open({str(file)!r}, 'a'))")
    for _ in range(2):
        assert go(monkeypatch, tmp_path, Step("stale", command, command, 1, goes_on=True))[0] == 0
    assert file.read_text() == "x\nx\n"


def test_a_step_ends_at_its_bound_and_keeps_what_it_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow = ("-c", "import time; print('begun'); time.sleep(600)")
    status, record = go(monkeypatch, tmp_path, Step("slow", slow, slow, 0.1), Step("good", GOOD, GOOD, 1))
    assert status == 1
    assert record["slow"]["status"] == 124
    assert (tmp_path / "slow.log").read_text() == "begun\n"
    assert record["good"]["status"] == 0


def test_a_smoke_run_has_the_time_of_its_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    step = Step("good", GOOD, GOOD, 0.01)
    assert go(monkeypatch, tmp_path, step) == (0, {})
    assert go(monkeypatch, tmp_path, step, smoke=True)[1]["good"]["status"] == 0


def test_without_time_nothing_is_begun(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert go(monkeypatch, tmp_path, Step("good", GOOD, GOOD, 1), minutes=0.01) == (0, {})
    assert "good: left out, no time is left" in capsys.readouterr().out


def test_only_steps_that_are_named_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steps = Step("bad", BAD, BAD, 1), Step("good", GOOD, GOOD, 1)
    assert go(monkeypatch, tmp_path, *steps, only="good")[0] == 0
    with pytest.raises(typer.BadParameter, match="no stage 7"):
        runner.main(7, tmp_path)


def test_wheels_that_are_too_large_are_refused(tmp_path: Path) -> None:
    (tmp_path / "small.whl").write_bytes(b"x" * 2**20)
    bundle.check_size(tmp_path)
    (tmp_path / "large.whl").write_bytes(b"x" * 2**21)
    with pytest.raises(
        bundle.BundleError, match=r"hold 3.0 MiB, more than the 2.0 MiB .* largest: large.whl \(2.0 MiB\)"
    ):
        bundle.check_size(tmp_path, most=2**21)
    assert bundle.MOST == 50 * 2**20


def test_pins_are_those_of_the_tests() -> None:
    lines = (ROOT / "tests/constraints/trl-1.16.txt").read_text().splitlines()
    locked = [line.partition(";")[0].strip() for line in lines]
    for pin in ("trl", "datasets", "dill", "multiprocess"):
        assert next(line for line in bundle.PINS if line.startswith(f"{pin}==")) in locked


def test_deepspeed_is_that_of_the_tests() -> None:
    lines = (ROOT / "tests/constraints/openrlhf-0.11.txt").read_text().splitlines()
    deepspeed, *dependencies = bundle.DEEPSPEED
    assert f'"{deepspeed}"' in (ROOT / "noxfile.py").read_text()
    assert set(dependencies) <= {line.partition(";")[0].strip().replace("_", "-") for line in lines}


def test_what_cannot_be_fetched_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name in ("PIP_FIND_LINKS", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        bundle.BundleError, match=r"trl==1.16.0 could not be downloaded.*index can be reached.*pip says"
    ):
        bundle.fetch("trl==1.16.0", tmp_path, "3.12")


def test_instructions_say_call_by_call_what_is_sent_and_run(tmp_path: Path) -> None:
    for name in ("wheels/trl.whl", "tree/pyproject.toml", "model/1/part", "model/2/part"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * 2**20)
    text = bundle.readme(tmp_path, "3.12")
    places = [text.index(f"bash {call.script}") for call in bundle.CALLS]
    assert places == sorted(places)
    assert text.index("model/1/ (1.0 MiB)") < places[0] < text.index("model/2/ (1.0 MiB)") < places[1]
    assert max(map(len, text.splitlines())) <= bundle.WIDTH
    assert {call.stage for call in bundle.CALLS} == set(STAGES)
    assert all((bundle.SCRIPTS / name).exists() for name in bundle.SMALL)


def test_scripts_are_shell_and_name_their_stage() -> None:
    for call in bundle.CALLS:
        file = bundle.SCRIPTS / call.script
        subprocess.run(["bash", "-n", str(file)], check=True)
        assert f'stage {call.stage} "$@"' in file.read_text()


def test_a_call_without_the_first_one_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(bundle.SCRIPTS / "call-3.sh")], env={"WORK": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "run call 1 first" in done.stderr


def test_packages_that_are_missing_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(needed, "NEEDED", ("json", "no_such_package"))
    assert needed.main() == 1
    assert f"{sys.executable} lacks no_such_package:" in capsys.readouterr().err


def test_copy_of_the_repository_does_not_hide_the_installed_package(tmp_path: Path) -> None:
    tree = bundle.copy(bundle.TREE, tmp_path / "tree")
    assert not (tree / "kl_plugins").exists()
    assert not list(tree.rglob("__pycache__"))
    assert "[tool.pytest.ini_options]" in (tree / "pyproject.toml").read_text()
