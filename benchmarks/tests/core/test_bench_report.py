"""``python -m benchmarks.report``: one page from what there is, and said what there is not."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.overhead.measure import Block, summary
from benchmarks.overhead.plan import AGAIN, HOST, PAIRS, SPEC
from benchmarks.report.__main__ import render
from benchmarks.report.sections import SECTIONS
from benchmarks.report.tables import table_of, tables_of

ROOT = Path(__file__).parents[3]
PIXEL = b"\x89PNG\r\n\x1a\n-not-a-real-picture"
CLAIM = {
    "claim": "c", "source": "s", "says": "k1 <as a loss> is like none", "rule": "r", "task": "rare", "family": "qwen2",
    "seeds": [1, 2], "log": True, "effect": 0.0, "low": -0.1, "high": 0.1, "verdict": "not reproduced",
}  # fmt: skip
STUDY = {
    "claims": [CLAIM], "references": [{"task": "rare", "reward": 0.015}], "verdict": "Of 1 tests: ...",
    "command": "python -m benchmarks.study", "machine": {"processor": "a processor", "gpu": None},
    "cells": [{"task": "rare", "family": "qwen2", "arm": "none", "delay": 16, "precision": "fp32", "seeds": [1, 2],
               "measures": {n: [1.0, 2.0] for n in ("reward", "kl", "entropy", "objective")}}],
}  # fmt: skip


def write(root, name, data, text=None):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data) if text is None else text)
    return path


def test_without_results_everything_is_said_to_be_missing(tmp_path):
    page, found = render(tmp_path)
    assert not any(f.measured for f in found)
    for section in SECTIONS:
        assert section.title in page
        assert page.count(section.command) == 2  # in its section, and in the list of what was not measured
    assert "<img" not in page


def test_what_is_there_is_shown(tmp_path):
    write(tmp_path, "study/study.json", STUDY).with_name("verdicts.png").write_bytes(PIXEL)
    write(tmp_path, "hosts/parity.json", {"verdict": "largest 3e-7", "parity": [{"host": "trl", "gradient": 3e-7}]})
    page, found = render(tmp_path)
    assert [f.section.name for f in found if f.measured] == ["study", "hosts"]
    assert "k1 &lt;as a loss&gt; is like none" in page  # escaped
    assert 'tr class="not-reproduced"' in page
    assert "×1 [×0.905, ×1.11]" in page
    assert "1.500 ± 0.707" in page
    assert "largest 3e-7" in page
    assert "<td>3e-07</td>" in page
    assert "processor a processor" in page
    assert page.count("make bench-hosts") == 0  # measured, so not in the list of what was not
    assert page.count("<img") == 1


def test_page_is_self_contained(tmp_path):
    write(tmp_path, "study/study.json", STUDY).with_name("verdicts.png").write_bytes(PIXEL)
    page, _ = render(tmp_path)
    assert re.findall(r'src="([^"]{10})', page) == ["data:image"]
    assert "http://" not in page
    assert "<link" not in page
    assert "<script" not in page


@pytest.mark.parametrize("text", ["{", "[]", '{"cells": []}', ""])
def test_a_broken_file_is_said_and_stops_nothing(text, tmp_path):
    write(tmp_path, "study/study.json", None, text)
    write(tmp_path, "collectives/collectives.json", {"rows": [{"host": "trl", "ratio": 1.003}]})
    page, found = render(tmp_path)
    by_name = {f.section.name: f for f in found}
    assert by_name["study"].broken
    assert not by_name["study"].measured
    assert "Could not be read: study.json" in page
    assert "1.003" in page


def test_rows_are_found_wherever_they_lie():
    data = {
        "machine": {"rows": [{"a": 1}]},
        "cases": [{"title": "case", "rows": [{"name": "x", "seconds": {"median": 0.25, "all": [1, 2, 3, 4, 5]}}]}],
        "settings": {"steps": 300},
        "steps": [{"host": "trl", "seconds": {"host": {"median": 1.0}, "ours": {"median": 2.0}}}],
        "by_name": {"first": {"value": 1.0}, "second": {"value": None}},
    }
    found = {table.title: table for table in tables_of(data)}
    assert found.keys() == {"case – rows", "by name", "steps"}
    assert found["steps"].columns == ["host", "seconds.host.median", "seconds.ours.median"]
    assert found["case – rows"].columns == ["name", "seconds.median"]
    assert found["by name"].rows == [["first", "1"], ["second", ""]]


def test_columns_that_no_row_fills_are_left_out():
    made = table_of("t", [{"a": None, "b": 1}, {"b": True, "c": [1, 2]}])
    assert made.columns == ["b", "c"]
    assert made.rows == [["1", ""], ["yes", "1 / 2"]]


def test_command(tmp_path):
    write(tmp_path, "study/study.json", STUDY)
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.report", "--root", str(tmp_path)], cwd=ROOT, text=True, capture_output=True
    )
    assert run.returncode == 0, run.stderr
    assert "overhead: not measured here" in run.stdout
    assert "verdicts" in (tmp_path / "report.html").read_text()


def test_overhead_says_what_a_spec_adds_and_how_that_lies_against_the_target(tmp_path):
    blocks = {arm: [Block([seconds], 100, 10)] * 3 for arm, seconds in ((HOST, 2.0), (SPEC, 2.01), (AGAIN, 2.0))}
    rows = [{"host": "trl", **vars(pair), **summary(blocks, pair.target)} for pair in PAIRS["trl"]]
    write(tmp_path, "overhead/overhead.json", {"rows": rows})
    page, _ = render(tmp_path)
    assert "+10.0 (+10.0 to +10.0)" in page
    assert "+0.5 (+0.5 to +0.5) %" in page
    for target, cell in ((0.01, "1%: met"), (0.03, "3%: met"), (None, "no target")):
        assert page.count(f"<td>{cell}</td>") == sum(pair.target == target for pair in PAIRS["trl"]) > 0


def test_text_that_every_row_repeats_is_shown_once():
    rows = [{"case": name, "spec": name, "loss": 1.0, "gradient": 1.0} for name in ("k1@loss", "k2@loss")]
    assert table_of("parity", rows).columns == ["case", "loss", "gradient"]
    rows[0]["case"] = "k1@loss in 2 processes"
    assert table_of("parity", rows).columns == ["case", "spec", "loss", "gradient"]
