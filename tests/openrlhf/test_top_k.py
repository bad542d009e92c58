"""``top:`` in OpenRLHF: the reference actor gives its most probable tokens, and the policy worker trains with them.

Policy and reference are Ray actors of their own, so the numbers travel through the trainer process.
"""

import pytest
import ray

from kl_plugins.adapters.top_k import KEY
from tests.support.openrlhf import by_hand
from tests.support.openrlhf.assets import VOCABULARY
from tests.support.openrlhf.command_line import ONE_STEP

USE = ("--algo.kl.use_loss", "--algo.kl.estimator")
SPECS = (
    "exact@loss/top:8",
    "exact@loss/top:8/is:token",
    "exact@loss/top:8/is:token/floor:0.99",
    "exact@loss/top:8/is:prefix",
    "exact@loss/top:8/horizon:sequence/is:sequence",
)
MOVED = "after the policy has moved"


def ask_reference(harness, function, *arguments):
    """Call a function inside every reference actor."""
    workers = harness.reference._actor_handlers
    return ray.get([actor.__ray_call__.remote(function, *arguments) for actor in workers])


@pytest.fixture(scope="module", autouse=True)
def by_value():
    ray.cloudpickle.register_pickle_by_value(by_hand)


@pytest.fixture(scope="module")
def computed(harness, rollouts, assets):
    """What :func:`tests.support.openrlhf.by_hand.top_losses` finds in the worker, by spec, before and after a move."""
    trainer = harness.start((*USE, SPECS[0], *ONE_STEP, "--rollout.micro_batch_size", "8"))
    (experience,) = trainer.experience_maker.make_experience_batch(rollouts.experiences())
    arguments = (experience, 0.5, str(assets / "reference"), KEY)
    (fresh,) = harness.ask(by_hand.top_losses, SPECS[:2], *arguments)
    harness.ask(by_hand.move, 0.004)
    (moved,) = harness.ask(by_hand.top_losses, SPECS, *arguments)
    return {**dict(zip(SPECS[:2], fresh, strict=True)), **{(text, MOVED): found for text, found in zip(SPECS, moved)}}


@pytest.mark.parametrize("case", [*SPECS[:2], *((text, MOVED) for text in SPECS)], ids=str)
def test_the_gradient_is_that_of_set_bucket_and_remainder(computed, case):
    gap, size, kl, in_bucket, weight, missed = computed[case]
    assert gap < 1e-5
    assert size > 1e-3
    assert kl > 0.01
    assert 0.2 < in_bucket < 1
    assert (weight > 0.05) == (MOVED in case)
    assert abs(missed) < 1e-6
