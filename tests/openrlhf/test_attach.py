"""How the hooks get into OpenRLHF: in the launching process, in Ray's workers, lazily, visibly, and out again."""

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
from openrlhf.trainer import ppo_trainer
from openrlhf.trainer.ppo_utils import experience_maker, samples_generator
from openrlhf.trainer.ray import ppo_actor, vllm_engine
from openrlhf.utils.deepspeed import DeepspeedStrategy

from kl_plugins.adapters.openrlhf import HOST, attach, detach, diagnose, run
from kl_plugins.adapters.openrlhf.launch import HOOK, OWN_HOOK, VARIABLE, extended_flag, with_hook
from kl_plugins.adapters.versions import UnsupportedHostError
from kl_plugins.hosts import installed_hosts
from kl_plugins.patches.engine.patch import Hook
from kl_plugins.patches.openrlhf import HOOKS
from kl_plugins.patches.openrlhf.hooks import PATCHES
from tests.support.openrlhf.ray_support import ENVIRONMENT


@pytest.fixture(autouse=True)
def attached():
    attach()


def python(program, **environment):
    """What a new process prints, as JSON."""
    variables = {**os.environ, **ENVIRONMENT, **environment}
    command = [sys.executable, "-W", "ignore", "-c", program]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


def test_the_host_is_registered_and_healthy():
    assert installed_hosts()["openrlhf"] == HOST
    assert version("openrlhf") in HOST.tested
    assert {finding.level for finding in diagnose()} == {"ok"}


def test_attaching_imports_nothing_heavy():
    modules = python(
        f"import sys, json; before = set(sys.modules); from {HOOK.rpartition('.')[0]} import attach; attach()\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in set(sys.modules) - before})))"
    )
    assert not {"torch", "ray", "openrlhf", "vllm", "deepspeed", "transformers"} & set(modules)


def test_the_table_names_the_modules_that_are_watched():
    assert {patch.module for patch in PATCHES.patches} == set(HOOKS.modules)
    unchecked = {patch.qualname for patch in PATCHES.patches if not patch.fingerprints}
    assert unchecked == {"SamplingParams"}
    known = {name.partition(":")[2] for name in HOOKS.sources.checked}
    assert known | unchecked == {patch.qualname for patch in PATCHES.patches}


def test_every_name_that_openrlhf_calls_has_its_hook():
    for owner, name in [
        (ppo_actor, "compute_approx_kl"),
        (ppo_actor.ActorPPOTrainer, "training_step"),
        (DeepspeedStrategy, "optimizer_step"),
        (experience_maker, "compute_approx_kl"),
        (ppo_trainer.BasePPOTrainer, "train_step"),
        (samples_generator, "SamplingParams"),
    ]:
        assert isinstance(vars(owner)[name], Hook), name
    HOOKS.check_process()


def test_a_hook_travels_by_reference():
    from ray import cloudpickle

    for hook in (ppo_actor.ActorPPOTrainer.training_step, vllm_engine.create_vllm_engines):
        assert cloudpickle.loads(cloudpickle.dumps(hook)) is hook


def test_detach_restores_openrlhfs_own_objects_and_attach_comes_back():
    places = [(patch.owner(), patch.attribute) for patch in PATCHES.patches]
    hooks = [vars(owner)[name] for owner, name in places]
    detach()
    try:
        assert [vars(owner)[name] for owner, name in places] == [hook.__wrapped__ for hook in hooks]
        assert not any(isinstance(vars(owner)[name], Hook) for owner, name in places)
        with pytest.raises(UnsupportedHostError, match="has no hook in this process"):
            HOOKS.check_process()
        detach()
    finally:
        attach()
    HOOKS.check_process()


def test_a_hook_that_failed_is_an_error_at_the_first_use_of_a_spec(monkeypatch, caplog):
    def broken(self, module):
        raise AttributeError("module has no attribute 'compute_approx_kl'")

    monkeypatch.setattr(HOOKS, "failures", [])
    monkeypatch.setattr(type(PATCHES), "apply", broken)
    HOOKS._imported(ppo_actor)  # an error here would break OpenRLHF where no spec is used
    assert "a KL spec will be refused" in caplog.text
    with pytest.raises(UnsupportedHostError, match=r"could not attach to OpenRLHF .* no attribute 'compute_approx_kl'"):
        HOOKS.check_process()


def test_the_ray_job_gets_the_hook_and_keeps_the_rest():
    assert json.loads(with_hook({})) == {"runtime_env": {"worker_process_setup_hook": HOOK}}
    job = {"metadata": {"job": "7"}, "runtime_env": {"env_vars": {"A": "1"}, "pip": ["x"]}}
    merged = with_hook({VARIABLE: json.dumps(job)})
    assert json.loads(merged) == {
        "metadata": {"job": "7"},
        "runtime_env": {**job["runtime_env"], "worker_process_setup_hook": HOOK},
    }
    assert with_hook({VARIABLE: merged}) == merged


def test_the_workers_get_our_own_variables():
    job = {"runtime_env": {"env_vars": {"A": "1", "KL_PLUGINS_B": "job"}}}
    environment = {VARIABLE: json.dumps(job), "KL_PLUGINS_ALLOW_UNTESTED": "1", "KL_PLUGINS_B": "process", "C": "2"}
    variables = json.loads(with_hook(environment))["runtime_env"]["env_vars"]
    assert variables == {"A": "1", "KL_PLUGINS_ALLOW_UNTESTED": "1", "KL_PLUGINS_B": "job"}


def test_a_setup_hook_of_the_users_is_an_error_that_says_what_to_do():
    job = {"runtime_env": {"worker_process_setup_hook": "mine.set_up"}}
    with pytest.raises(ValueError, match=rf"mine\.set_up.*call {HOOK}\(\) in it and set {OWN_HOOK}=1"):
        with_hook({VARIABLE: json.dumps(job)})
    assert json.loads(with_hook({VARIABLE: json.dumps(job), OWN_HOOK: "1"})) == job


WORKER = """
import json, os, shutil, sys, tempfile
from kl_plugins.adapters.openrlhf.launch import VARIABLE, with_hook
os.environ[VARIABLE] = with_hook(os.environ)
import ray
folder = tempfile.mkdtemp(prefix="klp")
# As OpenRLHF's own program does: a runtime environment of its own, merged with the job's.
ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100_000_000, _temp_dir=folder,
         log_to_driver=False, runtime_env={"env_vars": {"FROM_PROGRAM": "1"}})

@ray.remote
class Actor:
    def seen(self):
        from kl_plugins.patches.openrlhf import HOOKS
        heavy = "torch" in sys.modules
        from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer
        step = type(vars(ActorPPOTrainer)["training_step"]).__name__
        return [HOOKS._attached, heavy, step, os.environ.get("FROM_JOB"), os.environ.get("FROM_PROGRAM")]

try:
    print(json.dumps(ray.get(Actor.remote().seen.remote(), timeout=200)))
finally:
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
"""


def test_every_ray_worker_of_the_job_attaches_before_anything_else():
    # What `ray job submit --runtime-env-json` leaves for its driver.
    job = json.dumps({"runtime_env": {"env_vars": {"FROM_JOB": "1"}}})
    assert python(WORKER, **{VARIABLE: job}) == [True, False, "Hook", "1", "1"]


def test_the_flag_takes_specs_only_while_the_program_runs(capsys):
    def parser():
        found = argparse.ArgumentParser()
        found.add_argument("--algo.kl.estimator", type=str, choices=["k1", "k2"], default="k1", help="100 %% native")
        found.add_argument("--other", choices=["a"])
        return found

    original = argparse._ActionsContainer.add_argument
    with extended_flag():
        extended = parser()
    assert argparse._ActionsContainer.add_argument is original
    for text in ("k2", "k2@loss/is:token", "grpo"):
        assert vars(extended.parse_args(["--algo.kl.estimator", text]))["algo.kl.estimator"] == text
    assert "100 % native kl-plugins: or a KL spec" in " ".join(extended.format_help().split())
    with pytest.raises(SystemExit):
        parser().parse_args(["--algo.kl.estimator", "k2@loss"])
    for text in ("k2@los", "k5", ""):
        with pytest.raises(SystemExit):
            extended.parse_args(["--algo.kl.estimator", text])
    shown = capsys.readouterr().err
    assert "did you mean: loss" in shown
    assert "invalid choice: 'k5'" in shown
    assert "a KL spec such as k2@loss" in shown


def test_running_leaves_the_process_as_it_was(capsys, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(sys, "argv", ["mine"])
    assert run("openrlhf", []) == 2
    assert "kl-plugins run openrlhf.cli.train_ppo_ray" in capsys.readouterr().err
    assert run("openrlhf.cli.train_ppo_ray", ["--help"]) == 0
    assert "k2@loss/is:token" in capsys.readouterr().out
    assert run("openrlhf.cli.train_ppo_ray", ["--algo.kl.estimator", "k2@loss/is:tokens"]) == 2
    assert "did you mean: token" in capsys.readouterr().err
    assert VARIABLE not in os.environ
