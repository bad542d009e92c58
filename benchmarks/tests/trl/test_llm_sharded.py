"""Gradients of TRL under FSDP2, in two processes on the CPU, and under ZeRO-2 and ZeRO-3 where DeepSpeed is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.llm import model, sharded
from benchmarks.llm.sharded_worker import FSDP2, STAGES, ZERO3
from benchmarks.tests.trl.study_support import needs_rollouts

pytestmark = [needs_rollouts, pytest.mark.timeout(600)]


def run(folder: Path, way: str, *arms: str) -> tuple[int, dict[str, Any], str]:
    """Run the command; its exit status, the results of a way, and its output."""
    arguments = ["--smoke", "--model", str(model.tiny(folder / "tiny")), "--out", str(folder / "out"), "--ways", way]
    done = CliRunner().invoke(sharded.app, [*arguments, *(("--arms", ",".join(arms)) if arms else ())])
    return done.exit_code, json.loads((folder / "out/summary.json").read_text())["ways"][way], done.output


def test_gradients_under_fsdp2_are_those_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, found, output = run(tmp_path, FSDP2)
    assert {arm: row["verdict"] for arm, row in found.items()} == dict.fromkeys(sharded.ARMS, sharded.EQUAL), output
    assert status == 0
    # The same command again finds everything done.
    monkeypatch.setattr(sharded, "launch", None)
    assert run(tmp_path, FSDP2)[:2] == (0, found)


@pytest.mark.full
def test_a_trainer_that_is_not_sharded_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sharded.WAYS, FSDP2, sharded.Way())
    status, found, _ = run(tmp_path, FSDP2, "k2@loss")
    assert status == 1
    assert found["k2@loss"]["text"] == "RuntimeError: model was trained as single, although fsdp2 was asked for"


@pytest.mark.full
@pytest.mark.skipif(sharded.reason_against(ZERO3) is not None, reason="needs DeepSpeed")
@pytest.mark.parametrize("way", STAGES)
def test_gradients_under_zero_are_those_of_one_process(tmp_path: Path, way: str) -> None:
    status, found, output = run(tmp_path, way)
    refused = sharded.WAYS[way].refused
    expected = {arm: sharded.REFUSED if arm in refused else sharded.EQUAL for arm in sharded.ARMS}
    assert {arm: row["verdict"] for arm, row in found.items()} == expected, output
    assert status == 0
