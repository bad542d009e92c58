"""veRL's two experimental asynchronous trainers: their own classes reach the hooks, and ask workers for receipts."""

import copy
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle

from kl_plugins.adapters.verl import age
from kl_plugins.adapters.verl.score import ScoreController
from kl_plugins.adapters.versions import UnsupportedHostError
from kl_plugins.metric_names import AGE
from kl_plugins.patches.engine.patch import Hook
from kl_plugins.patches.verl.trainer import session_of
from kl_plugins.receipts import MissingReceiptError
from tests.support.verl.ray_support import ASYNCHRONOUS
from tests.support.verl.roles import config_of
from tests.support.verl.workers import BETA, make_batch

pytestmark = pytest.mark.skipif(not ASYNCHRONOUS, reason="refused in this version")

SPEC = "k2@loss/is:token"
ONE_STEP = "verl.experimental.one_step_off_policy.ray_trainer:OneStepOffRayTrainer"
FULLY = "verl.experimental.fully_async_policy.fully_async_trainer:FullyAsyncTrainer"


def class_of(name: str) -> Any:
    """The class itself; one of the two is the class of a Ray actor."""
    module, _, attribute = name.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    return found.__ray_metadata__.modified_class if hasattr(found, "__ray_metadata__") else found


def started(name: str, workers: Any, assets: Path, kl_type: str = SPEC, **algorithm: Any) -> Any:
    """One of the trainers after it has started its workers and loaded its models, which are those of a test."""
    cls = class_of(name)
    trainer = cls.__new__(cls)
    loss = {"actor__use_kl_loss": True, "actor__kl_loss_coef": 0.1, "actor__kl_loss_type": kl_type}
    trainer.config = copy.deepcopy(config_of(str(assets / "model"), **loss))  # others share it
    for key, value in algorithm.items():
        trainer.config.algorithm[key] = value
    trainer.kl_ctrl_in_reward = SimpleNamespace(value=0.1)
    trainer.resource_pool_to_cls, trainer.device_name = {}, "cpu"

    def load_models() -> None:
        trainer.actor_rollout_wg = trainer.ref_policy_wg = workers

    trainer._init_models = load_models
    trainer._init_worker_groups()
    assert not hasattr(trainer, "actor_rollout_wg")
    trainer._init_models()
    return trainer


@pytest.mark.parametrize("name", [ONE_STEP, FULLY])
def test_what_the_trainers_inherit_is_hooked_also_where_ray_sends_the_class_by_value(name):
    sent = cloudpickle.loads(cloudpickle.dumps(class_of(name)))
    for name in ("_init_worker_groups", "_update_actor", "_compute_ref_log_prob"):
        method = getattr(sent, name)
        while not isinstance(method, Hook):
            method = method.__wrapped__  # Ray puts a function of its own around each method of an actor
        assert method._self_patch.attribute == name


@pytest.mark.parametrize("name", [ONE_STEP, FULLY])
def test_workers_train_once_the_trainer_has_their_receipts(name, single, model, assets):
    single.use(SPEC, receipts=False)
    batch = make_batch(model)
    with pytest.raises(RuntimeError, match="its trainer never asked for receipts"):
        single.step(batch)
    started(name, single.workers, assets)
    assert single.step(batch).metrics["kl_coef"] == BETA


@pytest.mark.parametrize("name", [ONE_STEP, FULLY])
def test_workers_with_another_spec_stop_the_trainer(name, single, assets):
    single.use("k3@loss", receipts=False)
    with pytest.raises(MissingReceiptError, match="holds k3@loss, not k2@loss/is:token"):
        started(name, single.workers, assets)


@pytest.mark.parametrize("name", [ONE_STEP, FULLY])
def test_a_penalty_gets_its_controller(name, single, assets):
    own = {"use_kl_in_reward": True, "kl_penalty": "k1@advantage"}
    trainer = started(name, single.workers, assets, kl_type="low_var_kl", **own)
    assert isinstance(trainer.kl_ctrl_in_reward, ScoreController)
    assert session_of(trainer).score is trainer.kl_ctrl_in_reward


def test_without_a_spec_nothing_is_asked(single, assets):
    single.use("low_var_kl", receipts=False)
    trainer = started(ONE_STEP, single.workers, assets, kl_type="low_var_kl")
    assert session_of(trainer) is None


def test_a_class_of_ones_own_is_refused(single, assets, monkeypatch):
    class Mine(class_of(ONE_STEP)):
        pass

    monkeypatch.setattr("tests.verl.test_separate.class_of", lambda name: Mine)
    with pytest.raises(UnsupportedHostError, match="Mine was not tested"):
        started(ONE_STEP, single.workers, assets)


V1 = SimpleNamespace(trainer_mode="separate_async", global_steps=5)
ONE = SimpleNamespace(_async_gen_next_batch=None, global_steps=5)
FIRST = SimpleNamespace(_async_gen_next_batch=None, global_steps=1)
ALL = SimpleNamespace(current_param_version=4, global_steps=9)


@pytest.mark.parametrize(
    ("trainer", "batch", "ages"),
    [
        (V1, SimpleNamespace(tags=[{"min_global_steps": 4}, {"min_global_steps": 2}]), [0, 2]),
        (V1, SimpleNamespace(tags=[{"min_global_steps": 3}, {"min_global_steps": 4, "is_padding": True}]), [1]),
        (V1, SimpleNamespace(tags=[{"min_global_steps": 3}, {}]), []),
        (SimpleNamespace(trainer_mode="sync", global_steps=5), SimpleNamespace(tags=[{"min_global_steps": 4}]), []),
        # Weights that were sent in step 4, before its update, have three updates in them; those of step 5 have four.
        (ONE, SimpleNamespace(non_tensor_batch={"min_global_steps": [4, 5]}), [1, 0]),
        (FIRST, SimpleNamespace(non_tensor_batch={"min_global_steps": [0]}), [0]),
        (ALL, SimpleNamespace(non_tensor_batch={"min_global_steps": [4, 3, 1]}), [0, 1, 3]),
        (ALL, SimpleNamespace(non_tensor_batch={"min_global_steps": [None, 3]}), []),
        (ALL, SimpleNamespace(non_tensor_batch={}), []),
    ],
)  # fmt: skip
def test_ages(trainer, batch, ages):
    assert age.ages_of(trainer, batch) == ages
    metrics = {}
    age.report(metrics, ages)
    assert metrics == ({age.MEAN: sum(ages) / len(ages), age.LARGEST: max(ages)} if ages else {})
    assert metrics.keys() in (set(), AGE.keys())
