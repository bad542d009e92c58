"""``python -m benchmarks.hosts`` with TRL alone, end to end, and what it says when a host is missing or fails."""

import json
import subprocess
import sys

import pytest
import trl
from packaging.version import Version

from benchmarks.drivers.launch import WorkerError, over_hosts, run_module
from tests.support.trl.launch import ROOT

LIMIT = 280

pytestmark = pytest.mark.skipif(
    Version(trl.__version__) < Version("1.16"), reason="the benchmark drives the newest TRL"
)


def test_trl_applies_the_cores_gradient(tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "benchmarks.hosts", "--smoke", "--out", str(tmp_path)]
    command += ["--python", f"trl={sys.executable}"]
    made = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=LIMIT)
    assert made.returncode == 0, made.stdout + made.stderr
    found = json.loads((tmp_path / "parity.json").read_text())
    assert found["within_target"]
    assert {row["spec"] for row in found["parity"]} >= {"k2@loss", "exact@loss", "k1@reward", "k1@advantage"}
    for row in found["parity"]:
        assert row["gradient"] < 1e-5, row["case"]
        assert row["log_probs"] < 1e-5, "TRL did not score the policy that was to be updated"
        assert max(map(abs, row["coefficients"])) > 0.1 or row["spec"] == "exact@loss"
    native = {row["setting"]: row["nearest"] for row in found["native"] if row["equal"]}
    assert native["k3 (near)"] == "k3@loss"
    assert native["k3, use_bias_correction_kl (near)"] == "k2@loss/is:token/behaviour:old"
    assert (tmp_path / "parity.png").read_bytes().startswith(b"\x89PNG")
    assert "largest relative difference to the core" in made.stdout


def test_a_host_that_is_not_one_is_an_error(tmp_path):
    command = [sys.executable, "-m", "benchmarks.hosts", "--out", str(tmp_path), "--python", "tlr=/nowhere"]
    made = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=LIMIT)
    assert made.returncode == 2
    assert "expected HOST=PATH" in made.stderr


def test_a_failing_worker_is_an_error_with_its_last_words(tmp_path):
    with pytest.raises(WorkerError, match=r"(?s)ended with status 1; the end of .*No such file"):
        run_module(sys.executable, "benchmarks.hosts.trl_update", tmp_path, tmp_path, tmp_path, log=tmp_path / "log")


def test_a_worker_that_hangs_is_ended(tmp_path):
    with pytest.raises(WorkerError, match="ran for more than 1 s"):
        run_module(
            sys.executable, "timeit", "-n1", "-r1", "import time; time.sleep(600)", log=tmp_path / "log", limit=1
        )


def test_the_others_go_on_without_a_host_that_fails(tmp_path):
    with over_hosts([f"trl={sys.executable}", f"verl={sys.executable}"], tmp_path) as hosts:
        assert list(hosts) == ["trl", "verl"]
        assert hosts.run("trl", "timeit", "-n1", "-r1", "1")
        assert hosts.failed == {}
        assert hosts.without() == ""
        assert not hosts.run("verl", "timeit", "1/0")
    assert "ZeroDivisionError" in hosts.failed["verl"]
    assert hosts.without() == "; failed: verl"
