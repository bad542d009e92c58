"""Exact terms in OpenRLHF's real policy worker: the logits of its training step, and a reference beside it."""

import pytest
import ray

from tests.support.openrlhf import by_hand
from tests.support.openrlhf.command_line import ONE_STEP

USE = ("--algo.kl.use_loss", "--algo.kl.estimator")
SPECS = (
    "exact@loss",
    "exact@loss/is:prefix",
    "exact@loss/horizon:sequence/is:decision",
    "k2@loss/horizon:sequence/future:exact/is:sequence",
)


def start(harness, rollouts, *flags):
    """A trainer under an exact spec, and one micro-batch of its experience."""
    ray.cloudpickle.register_pickle_by_value(by_hand)
    trainer = harness.start((*USE, "exact@loss", *ONE_STEP, "--rollout.micro_batch_size", "8", *flags))
    (experience,) = trainer.experience_maker.make_experience_batch(rollouts.experiences())
    return trainer, experience


@pytest.fixture(scope="module")
def computed(harness, rollouts, assets):
    """What :func:`tests.support.openrlhf.by_hand.exact_losses` finds in the worker, by spec."""
    _, experience = start(harness, rollouts)
    path = str(assets / "reference")
    harness.ask(by_hand.name_reference, path)
    harness.ask(by_hand.move, 0.004)
    (found,) = harness.ask(by_hand.exact_losses, SPECS, experience, 0.5, path)
    return dict(zip(SPECS, found, strict=True))


@pytest.mark.parametrize("text", SPECS)
def test_gradient_is_that_of_the_full_softmax(computed, text):
    gap, size, kl = computed[text]
    assert kl > 0.01
    assert size > 1e-3
    assert gap < 1e-3


def test_another_reference_than_the_hosts_is_refused(harness, rollouts):
    # The harness gives the reference actor other weights than those that the flags name.
    trainer = harness.start((*USE, "exact@loss", *ONE_STEP))
    with pytest.raises(ray.exceptions.RayTaskError, match="differ from those of OpenRLHF's reference actor by"):
        harness.train(trainer, rollouts)


def test_receipts_say_what_it_costs(harness, rollouts):
    trainer, _ = start(harness, rollouts)
    (receipt,) = harness.receipts(trainer)
    assert receipt.cost.startswith("a second copy of the reference in every policy worker")
