"""Faults that only one guard notices in OpenRLHF, beside those in its tests of refusals, faults and versions.

The table "Guards against a run without the regulariser" in CONTRIBUTING.md names these tests.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kl_plugins import KLSpec
from kl_plugins.adapters.openrlhf.score import ScoreController, shaping
from kl_plugins.patches.openrlhf import trainer as hooks
from kl_plugins.patches.openrlhf import worker
from tests.support.openrlhf import remote
from tests.support.openrlhf.command_line import LOSS, ONE_STEP


@pytest.mark.parametrize(
    ("how", "message"),
    [("never", "never asked for the KL of k2@loss"), ("twice", "asked for the KL of k2@loss/is:token twice")],
)
def test_a_training_step_that_computes_its_kl_elsewhere_is_stopped(harness, rollouts, how, message):
    trainer = harness.start((*LOSS, *ONE_STEP))
    harness.receipts(trainer)
    trainer._kl_plugins.confirmed = True  # receipts would find the replaced function; it is replaced after them
    harness.ask(remote.replace_kl, how)
    try:
        with pytest.raises(Exception, match=message):
            trainer.train_step(rollouts.experiences(), 0)
    finally:
        harness.ask(remote.replace_kl, "restore")


def test_a_spec_in_a_function_that_has_no_place_for_it_is_stopped():
    def own(log_probs: Any, log_probs_base: Any, kl_estimator: str) -> Any:
        raise NotImplementedError

    with pytest.raises(RuntimeError, match="from a place that kl-plugins does not know; a @loss spec works in"):
        worker.approx_kl(own, None, (torch.zeros(1, 1), torch.zeros(1, 1), "k2@loss"), {})


def run_of(text: str, **others: Any) -> Any:
    """A trainer under a spec."""
    trainer = SimpleNamespace(**others)
    setattr(trainer, hooks.ATTRIBUTE, hooks.TrainerRun(KLSpec.parse(text), confirmed=True))
    return trainer


def test_an_update_without_kl_metrics_is_stopped():
    trainer = run_of("k2@loss", kl_ctl=SimpleNamespace(value=0.1))
    with pytest.raises(RuntimeError, match="returned no kl/ metrics, so k2@loss was not applied"):
        hooks.ppo_train(lambda step: {"policy_loss": 0.1}, trainer, (0,), {})


def controller(text: str = "k1@advantage") -> ScoreController:
    """The controller of a score spec."""
    return ScoreController(KLSpec.parse(text), SimpleNamespace(value=0.1))


def test_an_update_whose_advantages_lack_the_penalty_is_stopped():
    control = controller()
    control.penalties.append((object(), torch.zeros(1, 1)))
    with pytest.raises(RuntimeError, match="never reached the advantages"):
        hooks.ppo_train(lambda step: {}, run_of("k1@advantage", kl_ctl=control), (0,), {})


def test_penalties_of_other_experiences_are_not_subtracted():
    control = controller()
    control.penalties.append((object(), torch.zeros(1, 1)))
    with pytest.raises(RuntimeError, match="belong to other experiences than the advantages"):
        control.subtract([object()])


def test_samples_whose_kl_is_not_asked_for_stop_the_run():
    with pytest.raises(RuntimeError, match="did not ask for the KL of every sample"), shaping(controller(), [object()]):
        pass


def test_a_kl_that_is_asked_for_too_often_stops_the_run():
    with shaping(controller(), []) as _, pytest.raises(RuntimeError, match="more often than it has batches"):
        worker.approx_kl(
            lambda log_probs, log_probs_base, kl_estimator: None,
            None,
            (torch.zeros(1, 1), torch.zeros(1, 1), "k1@advantage"),
            {},
        )
