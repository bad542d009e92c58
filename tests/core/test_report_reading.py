"""Reading logs: formats, names of runs, what is left out, and errors."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from kl_plugins.report.native import HostLogs, host_logs, recognise
from kl_plugins.report.reading import LogError, read_runs
from tests.support.report.logs_of_runs import LOGS, write_lines


def write_events(folder: Path, columns: dict[str, list[float]], first: int = 1) -> Path:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for key, values in columns.items():
            for step, value in enumerate(values, start=first):
                writer.add_scalar(key, value, step)
    return folder


@pytest.mark.parametrize(
    ("folder", "kind", "title", "active", "last"),
    [
        ("trl-default", "trainer state (log_history)", "TRL", True, 24),
        ("trl-native", "trainer state (log_history)", "TRL", False, 24),
        ("verl-default", "veRL's file logger", "veRL", True, 3),
        ("verl-native", "veRL's file logger", "veRL", False, 3),
        ("openrlhf-default", "TensorBoard event files", "OpenRLHF", True, 6),
    ],
)
def test_logs_of_real_runs(folder: str, kind: str, title: str, active: bool, last: int) -> None:
    (run,) = read_runs([str(LOGS / folder)])
    assert run.kind == kind
    assert run.logs is not None
    assert run.logs.title == title
    assert run.active is active
    assert run.steps() == (1, last)
    assert run.name == folder
    assert not run.notes
    assert all(run.of_role(role) for role in ("reward", "kl"))
    assert ("kl/value" in run.series) is active
    assert run.of_role("grad_norm")


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "first.jsonl"
    path.write_text(
        '{"step": 2, "kl/value": 0.5, "text": "a", "flag": true, "list": [1]}\n\n{"global_step": 1, "kl/value": 0}\n'
    )
    (run,) = read_runs([str(path)])
    assert run.series.keys() == {"kl/value"}
    assert run.series["kl/value"].steps == (1, 2)
    assert run.series["kl/value"].values == (0.0, 0.5)
    assert (run.name, run.kind, run.logs) == ("first", "JSON lines", None)


def test_null_and_nan_are_not_finite_numbers(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(
        '{"step": 1, "data": {"a": null}}\n{"step": 2, "data": {"a": NaN}}\n{"step": 3, "data": {"a": 1}}\n'
    )
    (run,) = read_runs([str(path)])
    assert [math.isnan(value) for value in run.series["a"].values] == [True, True, False]


def test_a_later_line_of_a_step_replaces_an_earlier_one_as_after_a_resume(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "log.jsonl", {"a": [1.0, 2.0, 3.0]})
    path.write_text(path.read_text() + '{"step": 2, "a": 20}\n{"step": 3, "b": 30}\n')
    (run,) = read_runs([str(path)])
    assert run.series["a"].values == (1.0, 20.0, 3.0)
    assert run.series["b"].steps == (3,)


def test_an_incomplete_last_line_is_left_out_and_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "log.jsonl", {"a": [1.0, 2.0]})
    path.write_text(path.read_text() + '{"step": 3, "a": 3')
    (run,) = read_runs([str(path)])
    assert run.series["a"].values == (1.0, 2.0)
    assert run.notes == ("The last line is incomplete and was left out: the run is still writing, or was stopped.",)


def test_other_lines_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "log.jsonl", {"a": [1.0, 2.0]})
    path.write_text("a warning\n" + path.read_text() + "[1]\n" + '{"a": 1}\n')
    (run,) = read_runs([str(path)])
    assert run.notes == ("3 of 5 lines are no JSON object with a step and were left out, the first of them line 1.",)


def test_event_files(tmp_path: Path) -> None:
    write_events(tmp_path / "tb", {"train/kl/value": [0.0, 0.5], "train/reward": [1.0, 2.0]})
    write_events(tmp_path / "tb", {"train/kl/value": [math.nan, 0.75]}, first=2)  # a second file, as after a resume
    (run,) = read_runs([str(tmp_path / "tb")])
    assert run.series.keys() == {"kl/value", "reward"}
    assert run.series["kl/value"].steps == (1, 2, 3)
    assert math.isnan(run.series["kl/value"].values[1])
    (file, *_) = sorted((tmp_path / "tb").iterdir())
    assert read_runs([str(file)])[0].series["reward"].values == (1.0, 2.0)


def test_event_files_keep_every_step(tmp_path: Path) -> None:
    write_events(tmp_path, {"train/reward": [float(step) for step in range(10_100)]})
    assert len(read_runs([str(tmp_path)])[0].series["reward"]) == 10_100


def test_a_folder_with_several_runs_of_tensorboard_is_several_runs(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_events(tmp_path / name, {"train/reward": [1.0]})
    assert [run.name for run in read_runs([str(tmp_path)])] == ["one", "two"]


def test_without_tensorboard_the_message_says_what_to_install(tmp_path: Path) -> None:
    write_events(tmp_path, {"train/reward": [1.0]})
    code = (
        "import sys; sys.modules['tensorboard'] = None\n"
        "from kl_plugins.report.reading import LogError, read_runs\n"
        "try:\n    read_runs(sys.argv[1:])\n"
        "except LogError as error:\n    print(error)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], text=True, capture_output=True, check=True
    ).stdout
    assert "needs the package tensorboard" in said
    assert 'pip install "kl-plugins[report]"' in said


def test_the_state_with_the_longest_history_is_read(tmp_path: Path) -> None:
    for name, steps in (("checkpoint-2", 2), ("checkpoint-10", 10), (".", 4)):
        (tmp_path / name).mkdir(exist_ok=True)
        history = [{"step": step, "kl": 0.1} for step in range(1, steps + 1)]
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"global_step": steps, "log_history": history}))
    (run,) = read_runs([str(tmp_path)])
    assert run.steps() == (1, 10)
    assert run.name == tmp_path.name  # and not the name of the checkpoint


def test_runs_have_short_names_that_differ(tmp_path: Path) -> None:
    for name in ("a/seed-1", "a/seed-2", "b/seed-1"):
        (tmp_path / name).mkdir(parents=True)
        write_lines(tmp_path / name / "metrics.jsonl", {"kl/value": [0.0]})
    assert [run.name for run in read_runs([f"{tmp_path}/a/seed-1", f"{tmp_path}/a/seed-2"])] == ["seed-1", "seed-2"]
    both = [f"{tmp_path}/a/seed-1", f"{tmp_path}/b/seed-1"]
    assert [run.name for run in read_runs(both)] == ["a/seed-1", "b/seed-1"]
    assert [run.name for run in read_runs([f"mine={both[0]}", both[1]])] == ["mine", "b/seed-1"]
    assert [run.name for run in read_runs([both[0], both[0]])] == ["seed-1", "seed-1 (2)"]
    sweep = tmp_path / "lr=0.1"
    sweep.mkdir()
    write_lines(sweep / "metrics.jsonl", {"kl/value": [0.0]})
    assert [run.name for run in read_runs([str(sweep), f"lr=slow={sweep}"])] == ["lr=0.1", "lr=slow"]
    assert [run.name for run in read_runs([f"x={both[0]}", f"x={both[1]}"])] == ["x", "x (2)"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("missing.jsonl", None, "does not exist"),
        ("log.jsonl", "", "has no line that is a JSON object with a step"),
        ("log.jsonl", "text\n", "has no line that is a JSON object with a step"),
        ("log.jsonl", '{"step": 1, "a": "b"}\n', "holds no number with a step"),
        ("trainer_state.json", "{}", "is no trainer state with a log_history"),
        ("trainer_state.json", "{", "is no trainer state with a log_history"),
        ("trainer_state.json", '{"log_history": [{"kl": 1}]}', "is no trainer state with a log_history"),
    ],
)
def test_what_is_no_log_is_an_error_that_names_the_formats(
    name: str, text: str | None, words: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(LogError, match=words) as raised:
        read_runs([str(tmp_path / name)])
    assert "Readable are" in str(raised.value)


def test_files_that_are_no_text_and_folders_without_logs_are_errors(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(LogError, match="cannot be read"):
        read_runs([str(tmp_path / "model.bin")])
    with pytest.raises(LogError, match="holds no log"):
        read_runs([str(tmp_path)])


def test_every_host_says_what_its_logs_mean() -> None:
    found = {logs.title: logs for logs in host_logs()}
    assert found.keys() == {"TRL", "veRL", "OpenRLHF"}
    for logs in found.values():
        roles = {metric.role for metric in logs.metrics}
        assert {"reward", "kl", "grad_norm", "entropy"} <= roles
        assert all(metric.meaning.startswith("is ") for metric in logs.metrics)
        keys = [metric.key for metric in logs.metrics]
        assert len(keys) == len(set(keys))


def test_a_log_that_fits_two_frameworks_equally_belongs_to_none() -> None:
    one, two = HostLogs("one", ("a", "b/"), ()), HostLogs("two", ("a", "c"), ())
    assert recognise(["a", "b/x"], (one, two)) is one
    assert recognise(["a"], (one, two)) is None
    assert recognise(["z"], (one, two)) is None
