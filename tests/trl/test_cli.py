"""``kl-plugins run trl grpo``: TRL's own script and parser, with ``kl`` as one of its keys."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from kl_plugins import KLSpecError
from kl_plugins.adapters.trl import diagnose, run
from tests.support.trl import trainers
from tests.support.trl.launch import LIMIT, ROOT, accelerate_launch, torchrun


@pytest.fixture
def config_file(model, tmp_path):
    """A YAML file as a user writes it, and a data set on disk."""
    data = tmp_path / "data"
    data.mkdir()
    trainers.prompts(32).to_parquet(data / "train.parquet")

    def write(**changes):
        changes = {
            "model_name_or_path": model,
            "dataset_name": str(data),
            "reward_funcs": ["tests.support.trl.trainers.even_reward"],
            **trainers.settings(tmp_path / "out", report_to="none", logging_dir=None, per_device_train_batch_size=4),
            **changes,
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in changes.items() if value is not None}))
        return str(path)

    write.state = tmp_path / "out" / "checkpoint-2" / "trainer_state.json"
    return write


@pytest.fixture(autouse=True)
def _command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", [*sys.argv])


def logged(config_file, key):
    history = json.loads(config_file.state.read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_spec_in_the_file(algorithm, config_file, capfd):
    path = config_file(kl="k1@advantage", save_strategy="steps", save_steps=2)
    assert run("trl", [algorithm, "--config", path]) == 0
    assert logged(config_file, "kl/active") == [1.0, 1.0]
    assert "kl-plugins: k1@advantage active in TRL" in capfd.readouterr().err


def test_spec_on_the_command_line_wins(config_file, capfd):
    path = config_file(kl="k1@advantage")
    assert run("trl.scripts.grpo", ["--config", path, "--kl", "k2@loss/is:token"]) == 0
    assert "kl-plugins: k2@loss/is:token active in TRL" in capfd.readouterr().err


def test_without_a_spec_it_is_stock(config_file, capfd):
    path = config_file(save_strategy="steps", save_steps=2)
    assert run("trl", ["grpo", "--config", path]) == 0
    assert logged(config_file, "kl")
    assert not logged(config_file, "kl/active")
    assert "kl-plugins" not in capfd.readouterr().err


def test_unknown_key_in_the_file(config_file):
    with pytest.raises(ValueError, match="kl_plugin"):
        run("trl", ["grpo", "--config", config_file(kl_plugin="k2@loss")])


def test_unknown_argument(config_file):
    with pytest.raises(ValueError, match="--kl_spec"):
        run("trl", ["grpo", "--config", config_file(), "--kl_spec", "k2@loss"])


def test_typo_in_the_spec(config_file):
    with pytest.raises(KLSpecError, match="loss"):
        run("trl", ["grpo", "--config", config_file(kl="k2@lose")])


@pytest.mark.parametrize("arguments", [[], ["online_dpo"], ["sft"]])
def test_scripts_without_a_seam(arguments, capsys):
    assert run("trl", arguments) == 2
    assert "grpo and rloo" in capsys.readouterr().err


def test_plain_process(config_file):
    done = subprocess.run(
        [sys.executable, "-m", "kl_plugins", "run", "trl", "grpo", "--config", config_file(kl="default")],
        cwd=ROOT, env={**os.environ}, text=True, capture_output=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "kl-plugins: k2@loss/is:token/floor:0.5 active in TRL" in done.stderr


@pytest.mark.parametrize("launch", [torchrun, accelerate_launch])
def test_two_processes(launch, config_file):
    done = launch("kl_plugins", "run", "trl", "grpo", "--config", config_file(kl="k2@loss"))
    assert done.returncode == 0, done.stdout[-6000:]
    for rank in (0, 1):
        assert f"rank {rank} of 2" in done.stdout


def test_diagnosis_of_the_installed_trl():
    levels = [finding.level for finding in diagnose()]
    assert levels == ["ok", "ok"]


def test_diagnosis_of_an_unknown_version(monkeypatch):
    from kl_plugins.adapters import base

    monkeypatch.setattr(base, "version", lambda name: "1.17.0")
    fault = diagnose()[0]
    assert fault.level == "fault"
    assert "<1.17" in fault.message
    assert fault.remedy
