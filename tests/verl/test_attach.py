"""How the hooks get into veRL: by its entry point, lazily, visibly, and out again."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points, version

import pytest
import torch
from verl.trainer.ppo import core_algos, ray_trainer
from verl.utils import config as verl_config
from verl.workers import engine_workers
from verl.workers.utils import losses

from kl_plugins.adapters.verl import HOST, attach, detach, diagnose
from kl_plugins.adapters.versions import UnsupportedHostError
from kl_plugins.hosts import installed_hosts
from kl_plugins.patches import verl
from kl_plugins.patches.engine.patch import Hook
from kl_plugins.patches.verl import HOOKS
from kl_plugins.patches.verl.hooks import PATCHES
from tests.support.verl.ray_support import ENVIRONMENT, SINCE_0_9


def python(program, **environment):
    """What a new process prints, as JSON."""
    variables = {**os.environ, **ENVIRONMENT, **environment}
    result = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


def test_the_host_is_registered_and_healthy():
    assert installed_hosts()["verl"] == HOST
    assert [point.value for point in entry_points(group="verl.plugins", name="kl_plugins")] == [
        "kl_plugins.patches.verl.entry"
    ]
    assert version("verl") in HOST.tested
    assert {finding.level for finding in diagnose()} == {"ok"}


def test_importing_verl_imports_next_to_nothing_of_ours():
    ours = python(
        "import verl, sys, json; print(json.dumps(sorted(m for m in sys.modules if m.startswith('kl_plugins'))))"
    )
    assert set(ours) == {
        "kl_plugins",
        "kl_plugins.adapters",
        "kl_plugins.adapters.base",
        "kl_plugins.adapters.verl",
        "kl_plugins.adapters.versions",
        "kl_plugins.controllers",
        "kl_plugins.hosts",
        "kl_plugins.patches",
        "kl_plugins.patches.engine",
        "kl_plugins.patches.engine.on_import",
        "kl_plugins.patches.verl",
        "kl_plugins.patches.verl.entry",
        "kl_plugins.spec",
        "kl_plugins.spec.errors",
        "kl_plugins.spec.grammar",
        "kl_plugins.spec.observation",
        "kl_plugins.spec.presets",
    }


@pytest.mark.skipif(SINCE_0_9, reason="finds plugins by itself")
def test_doctor_says_where_an_older_verl_is_not_told_of_the_plugin(monkeypatch):
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "verl_on_cpu")
    (fault,) = (finding for finding in diagnose() if finding.level == "fault")
    assert fault.subject == "VERL_USE_EXTERNAL_MODULES"
    assert "VERL_USE_EXTERNAL_MODULES=kl_plugins.patches.verl.entry" in fault.remedy


@pytest.mark.skipif(not SINCE_0_9, reason="veRL without entry points")
def test_doctor_says_where_entry_points_are_switched_off(monkeypatch):
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none")
    assert [finding.subject for finding in diagnose() if finding.level == "fault"] == ["VERL_USE_EXTERNAL_PLUGINS"]
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "mine, kl_plugins")
    assert not [finding for finding in diagnose() if finding.level == "fault"]


def test_the_table_names_the_modules_that_are_watched():
    assert {patch.module for patch in PATCHES.patches} == set(verl.HOOKS.modules)
    assert all(patch.fingerprints for patch in PATCHES.patches)
    assert HOOKS.sources.expected("0.9.0") == HOOKS.sources.checked
    assert {name for name in HOOKS.sources.checked if name not in HOOKS.sources.expected("0.8.0")} == {
        name for name in HOOKS.sources.checked if ".v1." in name
    }
    homes = {name.partition(":")[2] for name in HOOKS.sources.checked}
    assert homes == {patch.qualname for patch in PATCHES.patches}


def test_names_imported_by_other_modules_are_one_hook():
    assert losses.kl_penalty is core_algos.kl_penalty
    assert engine_workers.ppo_loss is losses.ppo_loss
    if SINCE_0_9:
        from verl.trainer.ppo.v1 import trainer_base

        assert trainer_base.apply_kl_penalty is ray_trainer.apply_kl_penalty
    assert isinstance(losses.ppo_loss, Hook)
    HOOKS.check_process()


def test_a_hook_travels_by_reference():
    from ray import cloudpickle

    assert cloudpickle.loads(cloudpickle.dumps(losses.ppo_loss)) is losses.ppo_loss
    method = engine_workers.TrainingWorker.train_batch
    assert cloudpickle.loads(cloudpickle.dumps(method)) is method
    validate = verl_config.validate_config
    assert isinstance(validate, verl.ConfigHook)
    assert cloudpickle.loads(cloudpickle.dumps(validate)) is validate


def test_detach_restores_verls_own_objects_and_attach_comes_back():
    places = [(patch.owner(), patch.attribute) for patch in PATCHES.patches if patch.module in sys.modules]
    hooks = [vars(owner)[name] for owner, name in places]
    detach()
    try:
        assert [vars(owner)[name] for owner, name in places] == [hook.__wrapped__ for hook in hooks]
        assert not any(isinstance(vars(owner)[name], Hook) for owner, name in places)
        with pytest.raises(UnsupportedHostError, match="has no hook in this process"):
            HOOKS.check_process()
        for text in ("k2@loss/is:token", "k1@reward"):
            with pytest.raises(NotImplementedError):  # veRL's own answer to an unknown estimator
                core_algos.kl_penalty(torch.zeros(1, 1), torch.zeros(1, 1), text)
        detach()
    finally:
        attach()
    HOOKS.check_process()


def test_a_hook_that_failed_is_an_error_at_the_first_use_of_a_spec(monkeypatch, caplog):
    def broken(module):
        raise AttributeError("module has no attribute 'ppo_loss'")

    monkeypatch.setattr(verl.HOOKS, "failures", [])
    monkeypatch.setattr(type(PATCHES), "apply", lambda self, module: broken(module))
    verl.HOOKS._imported(losses)  # an error here would break veRL where no spec is used
    assert "a KL spec will be refused" in caplog.text
    with pytest.raises(UnsupportedHostError, match=r"could not attach to veRL .* has no attribute 'ppo_loss'"):
        HOOKS.check_process()
