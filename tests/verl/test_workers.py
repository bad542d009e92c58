"""The loss in real training workers, against veRL's own KL losses and against the core called by hand."""

import math

import pytest
import torch

from kl_plugins.adapters.verl.metrics import finish
from kl_plugins.metrics import REDUCTIONS
from tests.support.verl import remote
from tests.support.verl.reference import by_hand, distance
from tests.support.verl.workers import BETA, make_batch

SPEC = "k2@loss/is:token"


@pytest.fixture(scope="module")
def batch(model):
    return make_batch(model)


@pytest.fixture
def group(single):
    return single


def same(ours, theirs):
    return ours.keys() == theirs.keys() != set() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_k2_is_verls_k2_bit_by_bit(group, batch):
    host, ours = group.run("k2", batch), group.run("k2@loss", batch)
    assert same(ours.gradient, host.gradient)
    assert ours.metrics["kl_loss"] == host.metrics["kl_loss"] > 0
    assert ours.metrics["grad_norm"] == host.metrics["grad_norm"] > 0


def test_k3_is_verls_low_var_kl_inside_its_clamp(group, batch):
    host, ours = group.run("low_var_kl", batch), group.run("k3@loss", batch)
    # Two formulas of one number in float32.
    assert ours.metrics["kl_loss"] == pytest.approx(host.metrics["kl_loss"], rel=1e-5)
    assert distance(ours.gradient, host.gradient) < 1e-5


@pytest.mark.parametrize(
    "text",
    [
        "k2@loss/is:token",
        "k2@loss/is:token/behaviour:old/cap:1.1",
        "k2@loss/is:token/floor:0.99",
        "k3@loss/is:token/band:0.8-1.2",
        "k3+@loss/is:token/norm",
        "k2@loss/is:prefix",
        "jeffreys@loss/is:sequence/cap:3",
        "k2@loss/horizon:sequence/is:decision",
        "k2@loss/clip:0.1",
    ],
)
def test_every_correction_is_the_core_called_by_hand(text, group, batch, model):
    value, gradient, found = by_hand(model, batch, text)
    ours = group.run(text, batch)
    assert ours.metrics["kl_loss"] == pytest.approx(value, rel=1e-5)
    assert distance(ours.gradient, gradient) < 2e-5
    assert ours.metrics.keys() >= found.keys() | {"kl/beta"}
    for key, number in found.items():
        assert ours.metrics[key] == pytest.approx(number.item(), rel=1e-4, abs=1e-6), key
    assert ours.metrics["kl/beta"] == BETA


def test_off_policy_weights_change_the_gradient(group, batch):
    assert distance(group.run("k2@loss/is:token", batch).gradient, group.run("k2@loss", batch).gradient) > 0.05


def test_a_floor_that_raises_weights_changes_the_gradient(group, batch):
    floored = group.run("k2@loss/is:token/floor:0.99", batch)
    assert floored.metrics["kl/floor_frac"] > 0.1
    assert distance(floored.gradient, group.run("k2@loss/is:token", batch).gradient) > 1e-3


def test_two_padded_ranks_are_one_packed_rank(pair, group, batch):
    for text in ("k2@loss/is:token/cap:1.2", "k2@loss/horizon:sequence/is:decision"):
        one, both = group.run(text, batch), pair.run(text, batch)
        assert distance(both.gradient, one.gradient) < 2e-5
        for key in REDUCTIONS.keys() - {"kl/exact"}:
            assert both.metrics[key] == pytest.approx(one.metrics[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("reduced", [True, False], ids=["v1", "v0"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_metrics_do_not_depend_on_mini_batches(ranks, reduced, single, pair, batch):
    from verl.utils import tensordict_utils
    from verl.utils.metric import reduce_metrics

    whole = single.run(SPEC, batch).metrics
    group = {1: single, 2: pair}[ranks]
    group.use(SPEC)
    group.ask(remote.freeze)  # so that all epochs see the same policy
    data = batch.tensordict()
    sizes = {"mini_batch_size": 4, "global_batch_size": 4, "micro_batch_size_per_gpu": 2, "epochs": 3}
    tensordict_utils.assign_non_tensor(data, **sizes)
    first, *_ = group.by_rank(data)
    assert not isinstance(first, str), first
    metrics = tensordict_utils.get(first, "metrics")
    assert len(metrics["kl_plugins/sum/tokens"]) == 6
    assert len({*metrics["kl_plugins/sum/tokens"]}) > 1, "mini-batches of different sizes"
    if reduced:  # as the v1 trainers do before the metrics are theirs
        metrics = reduce_metrics(metrics)
    assert finish(metrics, prefix="")
    for key in REDUCTIONS.keys() - {"kl/exact"}:
        assert metrics[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-6), key
    assert not [key for key in metrics if "kl_plugins" in key]


def test_a_coefficient_changed_on_one_rank_stops_all(pair, batch):
    import ray

    pair.use("k2@loss/beta:linear-0.5-0-10")
    ray.get(pair.workers.workers[1].__ray_call__.remote(remote.set_coefficient, 0.25))
    unchanged, changed = pair.by_rank(batch.tensordict())
    assert "kl_loss_coef was changed during the run on 1 ranks" in unchanged
    assert "kl_loss_coef was changed from 0.5 to 0.25" in changed


def test_an_engine_that_takes_no_step_is_refused(single, batch):
    single.use(SPEC)
    (error,) = single.ask(remote.train_without_steps, batch.tensordict())
    assert "took 0 optimizer steps" in error


def test_an_empty_mask_gives_the_same_keys_and_no_gradient(group, batch):
    full = group.run("k2@loss/is:token", batch)
    masks = list(batch.masks)
    batch.masks[:] = [torch.zeros_like(mask) for mask in masks]
    try:
        empty = group.run("k2@loss/is:token", batch)
    finally:
        batch.masks[:] = masks
    assert empty.metrics.keys() == full.metrics.keys()
    assert all(math.isfinite(value) for key, value in empty.metrics.items() if key.startswith("kl/"))
    assert empty.metrics["kl/active"] == 1
    assert all(value.abs().max() == 0 for value in empty.gradient.values())
