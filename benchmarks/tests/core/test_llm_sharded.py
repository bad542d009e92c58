"""How gradients of sharded runs are judged; `benchmarks/tests/trl` computes real ones."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.llm import sharded
from benchmarks.llm.sharded import ABSENT, DIFFERENT, EQUAL, FAILED, REFUSED
from benchmarks.llm.sharded_worker import FSDP2, SINGLE, ZERO3, Plan, gradient_file

DONE = {"k2@loss": {"seconds": 1.0}, "exact@loss": {"seconds": 1.0}, "log": "the end"}


def verdict(folder: Path, factor: float, way: str = FSDP2) -> dict[str, Any]:
    """Judge a gradient that is ``factor`` times that of the single process."""
    gradient = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    torch.save(gradient, gradient_file(folder, SINGLE, "k2@loss"))
    torch.save({name: factor * part for name, part in gradient.items()}, gradient_file(folder, way, "k2@loss"))
    return sharded.judged(folder, way, "k2@loss", DONE, DONE)


@pytest.mark.parametrize(
    ("factor", "expected"),
    [(1.0, EQUAL), (1 + 5e-5, EQUAL), (1 + 2e-4, DIFFERENT), (0.0, DIFFERENT), (float("nan"), DIFFERENT)],
)
def test_gradients_are_equal_up_to_rounding(tmp_path: Path, factor: float, expected: str) -> None:
    found = verdict(tmp_path, factor)
    assert found["verdict"] == expected
    assert found["norm"] == pytest.approx(5.0)
    assert not gradient_file(tmp_path, FSDP2, "k2@loss").exists()


def test_a_gradient_of_zero_is_not_equal_to_itself(tmp_path: Path) -> None:
    for way in (SINGLE, FSDP2):
        torch.save({"a": torch.zeros(2)}, gradient_file(tmp_path, way, "k2@loss"))
    assert sharded.judged(tmp_path, FSDP2, "k2@loss", DONE, DONE)["verdict"] == DIFFERENT


@pytest.mark.parametrize(
    ("way", "arm", "text", "expected"),
    [
        (ZERO3, "exact@loss", "ValueError: kl-plugins: exact@loss cannot be used here: ... ZeRO-3 keeps ...", REFUSED),
        (ZERO3, "exact@loss", "RuntimeError: another error", FAILED),
        (ZERO3, "k2@loss", "ValueError: kl-plugins: ... ZeRO-3 ...", FAILED),
        (FSDP2, "exact@loss", "ValueError: kl-plugins: ... ZeRO-3 ...", FAILED),
    ],
)
def test_only_the_refusal_that_is_expected_is_one(tmp_path: Path, way: str, arm: str, text: str, expected: str) -> None:
    found = sharded.judged(tmp_path, way, arm, DONE, {arm: {"error": text}, "log": ""})
    assert found == {"verdict": expected, "text": text}


def test_what_should_be_refused_and_is_not_has_failed(tmp_path: Path) -> None:
    found = sharded.judged(tmp_path, ZERO3, "exact@loss", DONE, DONE)
    assert found == {"verdict": FAILED, "text": "kl-plugins did not refuse it"}


def test_processes_that_end_early_are_named_with_their_last_words(tmp_path: Path) -> None:
    found = sharded.judged(tmp_path, FSDP2, "k2@loss", DONE, {"log": "Killed"})
    assert found == {"verdict": FAILED, "text": "no result; the output ends with: Killed"}
    found = sharded.judged(tmp_path, FSDP2, "k2@loss", {"k2@loss": {"error": "no memory"}, "log": ""}, DONE)
    assert found == {"verdict": FAILED, "text": "single process: no memory"}


def test_processes_are_ended_when_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\necho $$\nsleep 600\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    start = time.monotonic()
    found = sharded.launch(tmp_path, SINGLE, ["k2@loss"], "cpu", tmp_path / "out", start)
    assert time.monotonic() - start < 60
    assert found == {"log": "ended, because the time was over"}
    number = int((tmp_path / "out/logs/single.log").read_text().split()[0])
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def test_without_deepspeed_its_absence_is_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(sharded.SITE, raising=False)
    monkeypatch.setattr(sharded, "find_spec", lambda name: None)
    assert sharded.reason_against(FSDP2) is None
    assert "DeepSpeed is not installed" in str(sharded.reason_against(ZERO3))
    (tmp_path / "deepspeed").mkdir()
    monkeypatch.setenv(sharded.SITE, str(tmp_path))
    assert sharded.reason_against(ZERO3) is None


def test_a_way_is_repeated_unless_every_arm_has_a_result() -> None:
    good, bad = {"verdict": EQUAL}, {"verdict": ABSENT}
    assert sharded.complete({"k2@loss": good, "exact@loss": {"verdict": REFUSED}})
    for verdicts in (None, {"k2@loss": good, "exact@loss": bad}, {"k2@loss": {"verdict": FAILED}}):
        assert not sharded.complete(verdicts)


def test_table_names_every_result_and_reason() -> None:
    record = {
        "plan": asdict(Plan("model")),
        "versions": {"trl": "1", "torch": "2", "accelerate": "3"},
        "machine": {"gpu": None, "processor": "a CPU"},
        "ways": {
            FSDP2: {"k2@loss": {"verdict": EQUAL, "difference": 1.5e-7, "norm": 0.25}},
            ZERO3: {"exact@loss": {"verdict": REFUSED, "text": "kl-plugins: it is in pieces"}},
        },
    }
    lines = sharded.table(record).splitlines()
    assert any(line.split() == ["fsdp2", "2", "k2@loss", "equal", "1.50e-07", "2.50e-01"] for line in lines)
    assert lines[-1] == "zero3, exact@loss: kl-plugins: it is in pieces"
