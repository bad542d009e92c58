"""``kl-plugins doctor``: faults are shown with a remedy and an exit status of 1, absence is no fault."""

import pytest

from kl_plugins.cli.doctor import version_finding
from kl_plugins.hosts import Host

from .conftest import document, run_cli, words

PRESENT = """
from kl_plugins.hosts import Host
HOST = Host("present", "third-party-present", ("present",), "{supported}", ("3.2.1",), {{"loss": "kl"}}, "{module}")
"""
ABSENT = """
from kl_plugins.hosts import Host
HOST = Host("gone", "never-published-anywhere", ("gone",), ">=1", ("1.0",), {"loss": "kl"}, "gone_adapter")
"""


def findings(document: dict[str, list[dict[str, str]]], section: str) -> dict[str, dict[str, str]]:
    return {finding["subject"]: finding for finding in document[section]}


def test_a_sound_installation() -> None:
    result = run_cli("doctor", "--json")
    found = document(result)
    assert result.returncode == 0, result.stdout
    assert found["faults"] == 0
    assert {"python", "torch", "kl-plugins", "estimators"} <= findings(found, "environment").keys()
    assert {"eager", "compiled on cpu", "triton"} <= findings(found, "backends").keys()
    assert any(subject.startswith("trl") for subject in findings(found, "hosts"))
    every = [finding for name in ("environment", "backends", "hosts") for finding in found[name]]
    assert all(finding["remedy"] for finding in every if finding["level"] != "ok")


def test_an_absent_host_is_no_fault(register) -> None:
    env = register("kl_plugins.hosts", "gone = gone_host:HOST", ABSENT)
    result = run_cli("doctor", "--json", env=env)
    finding = findings(document(result), "hosts")["gone"]
    assert (result.returncode, finding["level"]) == (0, "absent")
    assert "pip install" in finding["remedy"]


def test_a_broken_host_entry_point_is_a_fault_beside_the_others(register) -> None:
    env = register("kl_plugins.hosts", "broken = broken_host:HOST", "raise RuntimeError('half installed')")
    result = run_cli("doctor", "--json", env=env)
    found = findings(document(result), "hosts")
    assert result.returncode == 1
    assert found["broken"]["level"] == "fault"
    assert "half installed" in found["broken"]["message"]
    assert "third-party-broken" in found["broken"]["remedy"]
    assert any(subject.startswith("trl") for subject in found)
    text = run_cli("doctor", env=env)
    assert text.returncode == 1
    assert "Faults: 1." in text.stdout
    assert "-> repair or uninstall third-party-broken" in words(text.stdout)


def test_an_entry_point_that_is_no_host_is_a_fault(register) -> None:
    result = run_cli("doctor", "--json", env=register("kl_plugins.hosts", "odd = odd_host:HOST", "HOST = 'odd'"))
    assert result.returncode == 1
    assert "not a Host" in findings(document(result), "hosts")["odd"]["message"]


def test_an_adapter_that_fails_to_import_is_shown_not_raised(register) -> None:
    source = PRESENT.format(supported=">=3", module="no_such_adapter")
    result = run_cli("doctor", "--json", env=register("kl_plugins.hosts", "present = present_host:HOST", source))
    found = findings(document(result), "hosts")
    assert result.returncode == 1
    assert found["present adapter"]["level"] == "fault"
    assert "no_such_adapter" in found["present adapter"]["message"]
    assert found["present 3.2.1"]["message"] == "supported and tested"


def test_an_adapters_own_findings_are_shown(register) -> None:
    source = PRESENT.format(supported="<3", module="present_host") + (
        "from kl_plugins.hosts import Finding\n"
        "def diagnose():\n    return [Finding('warning', 'present seam', 'moved', 'look at it')]\n"
    )
    result = run_cli("doctor", "--json", env=register("kl_plugins.hosts", "present = present_host:HOST", source))
    found = findings(document(result), "hosts")
    assert found["present seam"] == {
        "level": "warning",
        "subject": "present seam",
        "message": "moved",
        "remedy": "look at it",
    }
    assert found["present 3.2.1"]["level"] == "fault"
    assert result.returncode == 1


def test_a_broken_estimator_package_is_a_fault(register) -> None:
    env = register("kl_plugins.estimators", "mine = broken_rows:register", "raise ImportError('no such lib')")
    result = run_cli("doctor", "--json", env=env)
    assert result.returncode == 1
    assert "no such lib" in findings(document(result), "environment")["estimators"]["message"]


@pytest.mark.parametrize(("backend", "status"), [("eager", 0), ("turbo", 1)])
def test_the_chosen_backend_is_checked(backend: str, status: int) -> None:
    result = run_cli("doctor", "--json", env={"KL_PLUGINS_BACKEND": backend})
    finding = findings(document(result), "backends")["KL_PLUGINS_BACKEND"]
    assert result.returncode == status
    assert (finding["level"] == "fault") is bool(status)


@pytest.mark.parametrize(("backend", "status"), [("eager", 0), ("turbo", 1), ("triton", 1)])
def test_the_chosen_exact_backend_is_checked(backend: str, status: int) -> None:
    result = run_cli("doctor", "--json", env={"KL_PLUGINS_EXACT_BACKEND": backend})
    found = findings(document(result), "backends")
    assert result.returncode == status
    assert (found["KL_PLUGINS_EXACT_BACKEND"]["level"] == "fault") is bool(status)
    assert found["exact KL on cpu"]["message"].startswith("eager")


def test_without_a_compiler_the_eager_path_is_named() -> None:
    result = run_cli("doctor", "--json", env={"CXX": "no-such-compiler"})
    finding = findings(document(result), "backends")["compiled on cpu"]
    assert (result.returncode, finding["level"]) == (0, "warning")
    assert "eager" in finding["message"]
    assert "g++" in finding["remedy"]


@pytest.mark.parametrize(
    ("version", "level", "message"),
    [
        ("1.5.0", "ok", "supported and tested"),
        ("1.6.0", "ok", "supported; tested versions are 1.5.0"),
        ("1.7.0rc1", "ok", "supported"),
        ("2.0", "fault", "outside the supported range"),
        ("0.9", "fault", "outside the supported range"),
    ],
)
def test_versions(version: str, level: str, message: str) -> None:
    host = Host("there", "there", ("there",), ">=1,<2", ("1.5.0",), {}, "there.adapter")
    finding = version_finding(host, version)
    assert finding.level == level
    assert message in finding.message


def test_the_sampling_settings_of_a_config_are_explained(tmp_path) -> None:
    config = tmp_path / "grpo.yaml"
    config.write_text("beta: 0.1\ntop_p: 0.9\ntop_k: 20\n")
    result = run_cli("doctor", "--json", "--config", str(config))
    finding = findings(document(result), "sampling")["truncated sampling"]
    assert (result.returncode, finding["level"]) == (0, "warning")
    for words_ in ("top_p 0.9, top_k 20", "15 % at top_p 0.9"):
        assert words_ in finding["message"]
    assert "is:prefix" in finding["remedy"]
    config.write_text("beta: 0.1\n")
    whole = findings(document(run_cli("doctor", "--json", "--config", str(config))), "sampling")
    assert whole["sampling"]["level"] == "ok"
    assert "the whole distribution" in whole["sampling"]["message"]
    assert "sampling" not in document(run_cli("doctor", "--json"))


def test_the_sampling_settings_of_a_script_are_found_and_a_broken_file_is_named(tmp_path) -> None:
    script = tmp_path / "run.sh"
    script.write_text("P=0.9\npython -m verl.trainer.main_ppo \\\n  actor_rollout_ref.rollout.top_p=$P\n")
    result = run_cli("doctor", "--json", "--config", str(script))
    assert "top_p 0.9" in findings(document(result), "sampling")["truncated sampling"]["message"]
    broken = tmp_path / "broken.yaml"
    broken.write_text("top_p: [0.9")
    result = run_cli("doctor", "--config", str(broken))
    assert result.returncode == 2
    assert "not YAML" in result.stderr


def test_a_config_that_cannot_be_read_is_named(tmp_path) -> None:
    result = run_cli("doctor", "--config", str(tmp_path / "none.yaml"))
    assert result.returncode == 2
    assert "cannot read" in result.stderr
    assert "none.yaml" in result.stderr
