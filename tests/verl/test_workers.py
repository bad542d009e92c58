"""The loss in real training workers, against veRL's own KL losses and against the core called by hand."""

import math

import pytest
import torch

from kl_plugins.metrics import REDUCTIONS
from tests.verl.reference import by_hand, distance
from tests.verl.workers import BETA, make_batch


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
    assert ours.metrics["kl_loss"] == pytest.approx(host.metrics["kl_loss"], rel=1e-6)
    assert distance(ours.gradient, host.gradient) < 1e-6


@pytest.mark.parametrize(
    "text",
    [
        "k2@loss/is:token",
        "k2@loss/is:token/behaviour:old/cap:1.1",
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


def test_two_padded_ranks_are_one_packed_rank(pair, group, batch):
    for text in ("k2@loss/is:token/cap:1.2", "k2@loss/horizon:sequence/is:decision"):
        one, both = group.run(text, batch), pair.run(text, batch)
        assert distance(both.gradient, one.gradient) < 2e-5
        for key in REDUCTIONS.keys() - {"kl/exact"}:
            assert both.metrics[key] == pytest.approx(one.metrics[key], rel=1e-4, abs=1e-6), key


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
