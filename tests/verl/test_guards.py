"""Faults that only one guard notices: each is injected into veRL, and the error is that guard's.

The table "Guards against a run without the regulariser" in CONTRIBUTING.md names these tests.
"""

from types import SimpleNamespace
from typing import Any

import pytest

from kl_plugins import KLSpec
from kl_plugins.adapters.verl import ADAPTER, require_receipts
from kl_plugins.adapters.verl.config import Specs
from kl_plugins.adapters.verl.score import ScoreController
from kl_plugins.patches.verl import trainer as hooks
from kl_plugins.receipts import MissingReceiptError
from tests.support.verl import remote
from tests.support.verl.workers import make_batch

SPEC = "k2@loss/is:token"


@pytest.fixture
def group(single):
    yield single
    single.ask(remote.replace_kl, "restore")


@pytest.fixture(scope="module")
def batch(model):
    return make_batch(model)


@pytest.mark.parametrize(
    ("how", "message"),
    [("never", "never asked for the KL of k2@loss"), ("twice", "asked for the KL of k2@loss/is:token twice")],
)
def test_a_loss_that_computes_its_kl_elsewhere_is_stopped(group, batch, how, message):
    group.use(SPEC)
    group.ask(remote.replace_kl, how)
    assert message in group.by_rank(batch.tensordict())[0]


def test_a_loss_outside_of_the_workers_training_step_is_stopped(group, batch):
    group.use(SPEC)
    assert "outside of TrainingWorker.train_batch" in group.ask(remote.train_outside, batch.tensordict())[0]


def test_another_loss_function_gets_no_receipt(group):
    group.use("low_var_kl")
    with pytest.raises(MissingReceiptError, match="its loss function holds no KL spec"):
        require_receipts(group.workers, SPEC)


def updated(specs: Specs, found: dict[str, Any], score: ScoreController | None = None) -> Any:
    """Run the hook around a trainer's update, whose workers return these metrics."""
    trainer = SimpleNamespace()
    setattr(trainer, hooks.ATTRIBUTE, hooks.TrainerSession(specs, score))

    def update(batch: Any) -> Any:
        return SimpleNamespace(meta_info={"metrics": found})

    return hooks.update_actor(update, trainer, (SimpleNamespace(),), {})


def test_an_update_without_kl_metrics_is_stopped():
    with pytest.raises(RuntimeError, match="returned no kl/ metrics, so k2@loss/is:token was not applied"):
        updated(Specs(KLSpec.parse(SPEC), None), {"actor/loss": [0.1]})


def test_an_update_whose_advantages_lack_the_penalty_is_stopped():
    spec = KLSpec.parse("k1@advantage")
    control = ScoreController(spec, SimpleNamespace(value=0.1))
    control.pending = True
    with pytest.raises(RuntimeError, match="never reached the advantages"):
        updated(Specs(None, spec), {}, control)


def test_sources_on_disk_are_checked_where_nothing_of_them_is_imported(monkeypatch):
    sources = ADAPTER.hooks.sources
    name = next(iter(sources.checked))
    monkeypatch.setitem(sources.installed, name, "0" * 16)
    with pytest.raises(RuntimeError, match="is not the code that kl-plugins was checked with"):
        sources.check()
