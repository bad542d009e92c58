"""Unsloth puts its own trainers in the place of TRL's: a spec is refused there, with what happened and what to do."""

import os
import subprocess
import sys
from types import ModuleType

import pytest
import trl
from trl.trainer import grpo_trainer

from kl_plugins.adapters import trl as adapter
from kl_plugins.adapters.versions import ALLOW_UNTESTED, UnsupportedHostError
from tests.support.trl import trainers
from tests.support.trl.launch import LIMIT, ROOT

STAND_IN = """
import trl
from trl.trainer import grpo_trainer

made = type("UnslothGRPOTrainer", (trl.GRPOTrainer,), {"__module__": "UnslothGRPOTrainer"})
trl.GRPOTrainer = trl.trainer.GRPOTrainer = grpo_trainer.GRPOTrainer = made
"""
ADVICE = "start a process that does not import Unsloth"


@pytest.fixture
def imported(monkeypatch):
    """A module of that name, which has changed nothing of TRL."""
    monkeypatch.setitem(sys.modules, "unsloth", ModuleType("unsloth"))


@pytest.fixture
def rewritten(monkeypatch):
    """Only its trainer, in TRL's place; the module itself was loaded under another name."""
    made = type("UnslothGRPOTrainer", (trl.GRPOTrainer,), {"__module__": "unsloth_compiled_cache.UnslothGRPOTrainer"})
    monkeypatch.setattr(grpo_trainer, "GRPOTrainer", made)
    monkeypatch.setattr(trl, "GRPOTrainer", made)


@pytest.mark.parametrize("cls", [adapter.GRPOConfig, adapter.RLOOConfig])
def test_a_config_with_a_spec(cls, imported, tmp_path):
    with pytest.raises(UnsupportedHostError, match=f"kl='k1@advantage' cannot be used here: Unsloth is.*{ADVICE}"):
        cls(**trainers.settings(tmp_path, kl="k1@advantage"))


def test_the_place_of_the_rewritten_class_is_named(rewritten, tmp_path):
    named = r"Unsloth has replaced trl\.GRPOTrainer by its own UnslothGRPOTrainer, which computes loss and KL itself"
    with pytest.raises(UnsupportedHostError, match=f"{named}.*{ADVICE}"):
        adapter.GRPOConfig(**trainers.settings(tmp_path, kl="default"))


def test_a_trainer_whose_config_is_older_than_unsloth(model, tmp_path, monkeypatch):
    args = adapter.GRPOConfig(**trainers.settings(tmp_path, kl="k2@loss"))
    monkeypatch.setitem(sys.modules, "unsloth", ModuleType("unsloth"))
    with pytest.raises(UnsupportedHostError, match=ADVICE):
        adapter.GRPOTrainer(model, trainers.even_reward, args=args, train_dataset=trainers.prompts())


def test_attach_changes_nothing(rewritten):
    with pytest.raises(UnsupportedHostError, match=rf"attach\(\) cannot put its hooks into TRL.*{ADVICE}"):
        adapter.attach()
    assert "kl" not in trl.GRPOConfig.__dataclass_fields__


def test_no_setting_allows_it(imported, tmp_path, monkeypatch):
    monkeypatch.setenv(ALLOW_UNTESTED, "1")
    with pytest.raises(UnsupportedHostError, match=ADVICE):
        adapter.GRPOConfig(**trainers.settings(tmp_path, kl="k2@loss"))


def test_without_a_spec_it_is_none_of_our_business(imported, rewritten, tmp_path):
    assert adapter.GRPOConfig(**trainers.settings(tmp_path)).kl is None


def test_unsloth_is_imported_first_as_it_asks_for(tmp_path):
    (tmp_path / "unsloth.py").write_text(STAND_IN)
    program = "import unsloth; from kl_plugins.adapters.trl import GRPOTrainer"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        text=True, capture_output=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "cannot derive its classes from TRL's: Unsloth has replaced trl.GRPOTrainer" in done.stderr, done.stderr
    assert ADVICE in done.stderr


def test_doctor_warns_where_it_is_installed(tmp_path, monkeypatch):
    (tmp_path / "unsloth.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = (finding for finding in adapter.diagnose() if finding.level == "warning")
    assert finding.subject == "unsloth"
    assert "does not import Unsloth" in finding.remedy
