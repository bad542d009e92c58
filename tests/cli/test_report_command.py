"""``kl-plugins report`` as a user starts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import document, run_cli, words
from tests.support.report.logs_of_runs import LOGS, write_lines

STALE = {"kl/floor_frac": [0.1] * 39 + [0.7] * 40, "kl/value": [0.01] * 79}


@pytest.fixture
def stale(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "stale.jsonl", STALE)


def test_findings_are_printed_and_the_page_is_written(stale: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    result = run_cli("report", str(stale), f"native={LOGS / 'trl-native'}", "--out", str(out))
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    said = words(result.stdout)
    assert "warning From step 40 on, half of all weights or more are below the floor" in said
    assert "TRL, trainer state (log_history), kl-plugins not active" in said
    assert said.endswith(f"wrote {out}")
    page = out.read_text(encoding="utf-8")
    assert "<title>KL report: stale, native</title>" in page
    assert "From step 40 on, half of all weights" in page


def test_the_page_is_report_html_by_default(stale: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kl_plugins", "report", stale.name]
    result = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "report.html").exists()


def test_json_has_runs_findings_and_last_values_and_writes_no_page(stale: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "broken.jsonl", {"kl/ess": [1.0, None]})
    result = run_cli("report", str(stale), str(path), "--json")
    assert result.returncode == 0, result.stderr
    found = document(result)
    assert [run["name"] for run in found["runs"]] == ["stale", "broken"]
    assert found["runs"][0]["steps"] == [1, 79]
    first = next(finding for finding in found["findings"] if finding["rule"] == "weights-below-floor")
    assert (first["level"], first["run"], first["since"], first["limit"]) == ("warning", "stale", 40, 0.5)
    values = {row["key"]: row["runs"] for row in found["last_values"]}
    assert values["kl/floor_frac"] == {"stale": {"step": 79, "value": 0.7}, "broken": None}
    assert values["kl/ess"]["broken"] == {"step": 2, "value": None}
    assert found["page"] is None
    json.loads(result.stdout, parse_constant=pytest.fail)  # NaN and Infinity are not JSON
    assert not list(tmp_path.glob("*.html"))


def test_json_and_a_page_can_be_had_together(stale: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert document(run_cli("report", str(stale), "--json", "--out", str(out)))["page"] == str(out)
    assert out.exists()


def test_a_run_without_findings_says_so(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "sound.jsonl", {"kl/value": [0.0, 0.001], "kl/ess": [1.0, 0.99]})
    result = run_cli("report", str(path), "--out", str(tmp_path / "page.html"))
    assert "No rule found anything, which does not prove that the run is sound." in words(result.stdout)


@pytest.mark.parametrize("as_json", [False, True])
def test_what_is_no_log_is_a_usage_error(as_json: bool, tmp_path: Path) -> None:
    result = run_cli("report", str(tmp_path / "nothing"), *(["--json"] if as_json else []))
    assert result.returncode == 2
    said = document(result)["error"]["message"] if as_json else result.stderr
    assert "does not exist. Readable are" in said


def test_a_page_that_cannot_be_written_is_an_error(stale: Path, tmp_path: Path) -> None:
    result = run_cli("report", str(stale), "--out", str(tmp_path / "missing" / "page.html"))
    assert result.returncode == 1
    assert "cannot be written" in result.stderr
    assert "--out" in result.stderr


def test_without_plotly_the_message_says_what_to_install_and_json_still_works(stale: Path, tmp_path: Path) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "plotly.py").write_text("raise ImportError('no plotly here')\n")
    path = os.pathsep.join(filter(None, [str(tmp_path / "hidden"), os.environ.get("PYTHONPATH")]))
    result = run_cli("report", str(stale), env={"PYTHONPATH": path})
    assert result.returncode == 1
    assert 'pip install "kl-plugins[report]"' in result.stderr
    assert "Traceback" not in result.stderr
    assert document(run_cli("report", str(stale), "--json", env={"PYTHONPATH": path}))["findings"]


@pytest.mark.parametrize("extra", [["--json"], ["--out", "page.html"]])
def test_neither_torch_nor_a_host_is_imported(extra: list[str], stale: Path, tmp_path: Path) -> None:
    script = (
        "import json, sys\n"
        "from kl_plugins.cli.app import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'trl', 'transformers', 'verl', 'openrlhf', 'ray', 'vllm', 'pydantic', 'tensorboard'}\n"
        "print(json.dumps(sorted(heavy & set(sys.modules))), file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", script, "report", str(stale), *extra]
    result = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=300)
    assert json.loads(result.stderr.splitlines()[-1]) == []
