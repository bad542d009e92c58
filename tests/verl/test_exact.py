"""Exact terms in real training workers: the logits of the engine, and those of the reference beside it."""

from dataclasses import replace

import pytest

from kl_plugins import KLSpec
from kl_plugins.receipts import MissingReceiptError
from tests.support.verl import remote
from tests.support.verl.main_ppo import KL_TYPE, LOSS, OF_TRAINER, finished, run
from tests.support.verl.ray_support import TRAINERS
from tests.support.verl.reference import by_hand, distance, exact_by_hand
from tests.support.verl.workers import BETA, Group, make_batch

SPECS = (
    "exact@loss",
    "exact@loss/is:prefix/cap:1.2",
    "exact@loss/horizon:sequence/is:decision",
    "k2@loss/horizon:sequence/future:exact/is:sequence",
)


@pytest.fixture(scope="module")
def batch(models):
    return make_batch(models[0])


def group_with_reference(assets, models, ranks, packed):
    import ray

    made = Group(str(assets / "model"), ranks, packed=packed)
    ray.get([worker.__ray_call__.remote(remote.add_reference, models[2]) for worker in made.workers.workers])
    return made


@pytest.fixture(scope="module")
def group(assets, cluster, models):
    made = group_with_reference(assets, models, 1, packed=True)
    yield made
    made.end()


@pytest.mark.parametrize("text", SPECS)
def test_gradient_is_that_of_the_full_softmax(text, group, batch, models):
    value, gradient, found = by_hand(models[0], batch, text, exact=exact_by_hand(models, batch))
    ours = group.run(text, batch)
    assert ours.metrics["kl_loss"] == pytest.approx(value, rel=1e-5)
    assert distance(ours.gradient, gradient) < 1e-4
    assert found["kl/exact"] > 0.01


def test_the_older_trainers_padded_responses_give_the_same(group, batch):
    for text in ("exact@loss", "k2@loss/horizon:sequence/future:exact/is:sequence"):
        packed, padded = (group.run(text, replace(batch, left_right=form)) for form in (False, True))
        # Two float32 passes over differently laid out batches: some 1e-7 apart, more on another processor.
        assert padded.metrics["kl/exact"] == pytest.approx(packed.metrics["kl/exact"], rel=1e-5)
        assert distance(padded.gradient, packed.gradient) < 1e-5


def test_two_padded_ranks_are_one_packed_rank(assets, cluster, group, batch, models):
    two = group_with_reference(assets, models, 2, packed=False)
    for text in SPECS[:3]:
        one, both = group.run(text, batch), two.run(text, batch)
        assert one.metrics["kl_coef"] == BETA
        assert distance(both.gradient, one.gradient) < 2e-5
    two.end()


def test_a_worker_without_the_reference_is_named(assets, cluster):
    alone = Group(str(assets / "model"), 1, packed=True)
    with pytest.raises(MissingReceiptError, match=r"rank 0 .*no reference model beside the actor.* use exact@loss/top"):
        alone.use("exact@loss")
    alone.end()


def test_a_spec_without_exact_terms_costs_nothing(group, batch):
    assert not KLSpec.parse("k2@loss").needs_exact
    assert "kl/exact" not in group.run("k2@loss", batch).metrics


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", TRAINERS)
def test_main_ppo(version, assets, tmp_path):
    settings = {**LOSS, **OF_TRAINER[version], KL_TYPE: "exact@loss", "actor_rollout_ref.actor.ppo_epochs": 2}
    result = run(assets, tmp_path, settings)
    _, second = finished(result)
    assert "costs a forward pass of the reference with its logits" in result.output
    assert second["kl/exact"] > 0
