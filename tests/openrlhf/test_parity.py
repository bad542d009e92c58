"""Specs that mean what one of OpenRLHF's own settings means train as it does, over several optimizer steps."""

import pytest
import torch

from tests.support.openrlhf.harness import LOSS, STOCK

KL = "--algo.kl.estimator"


def assert_same(ours, theirs):
    assert ours.parameters.keys() == theirs["parameters"].keys() != set()
    for name, values in theirs["parameters"].items():
        assert torch.equal(ours.parameters[name], values), name
    for key in ("policy_loss", "actor_grad_norm", "ppo_kl", "logprobs_diff", "return"):
        assert ours.metrics[-1][key] == theirs["metrics"][-1][key], key


@pytest.mark.parametrize("host", ["k1 loss unbiased", "k2 loss unbiased"])
def test_a_capped_token_weight_is_openrlhfs_unbiased_gradient_bit_by_bit(host, harness, rollouts, stock):
    ours = harness.run((*LOSS, "k2@loss/is:token/cap:10/behaviour:old"), rollouts)
    assert_same(ours, stock[host])
    assert ours.metrics[-1]["kl/weight/max"] > 1.05, "the weight has to matter"


def test_the_weight_of_the_sampler_trains_otherwise(harness, rollouts, stock):
    ours = harness.run((*LOSS, "k2@loss/is:token/cap:10/behaviour:sampler"), rollouts)
    theirs = stock["k2 loss unbiased"]["parameters"]
    assert any(not torch.equal(values, theirs[name]) for name, values in ours.parameters.items())


@pytest.mark.parametrize("host", ["k1", "k1 group_norm"])
def test_k1_in_reward_is_openrlhfs_own_bit_by_bit(host, harness, rollouts, stock):
    ours = harness.run((*STOCK[host], KL, "k1@reward"), rollouts)  # the last flag of a name counts
    assert_same(ours, stock[host])
    assert ours.metrics[-1]["kl"] == stock[host]["metrics"][-1]["kl"] != 0
