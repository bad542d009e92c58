"""What the KL term sees beside veRL's own corrections: rejected tokens, `rollout_is`, bypass mode, sequence ratios."""

from dataclasses import replace

import pytest
import torch

from tests.support.verl.reference import by_hand, difference, distance
from tests.support.verl.workers import make_batch

SPEC = "k2@loss/is:token"


@pytest.fixture(scope="module")
def batch(model):
    return make_batch(model, advantages=True)


@pytest.fixture
def group(single):
    return single


def corrected(batch, **settings):
    """The batch after veRL's own rollout correction, as its trainers send it to the workers."""
    from verl import DataProto
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch

    tensors = {key: batch.padded(batch.log_probs[key]) for key in ("old_log_probs", "rollout_log_probs")}
    data = DataProto.from_dict(tensors={**tensors, "response_mask": batch.padded(batch.masks)})
    data, _ = compute_rollout_correction_and_add_to_batch(data, settings)
    lengths = [len(mask) for mask in batch.masks]
    keys = {"response_mask", "rollout_is_weights"} & set(data.batch.keys())
    return replace(
        batch, extra={key: [row[:n].clone() for row, n in zip(data.batch[key], lengths, strict=True)] for key in keys}
    )


def kl_gradient(group, batch, text, **changes):
    """The KL's part of the gradient, and the metrics of the step that has it."""
    with_kl, without = group.run(text, batch, **changes), group.run(None, batch, **changes)
    assert distance(with_kl.gradient, without.gradient) > 0.01, "both parts have to show"
    return difference(with_kl.gradient, without.gradient), with_kl.metrics


@pytest.mark.parametrize(
    "text", [SPEC, "k2@loss/is:prefix", "k2@loss/horizon:sequence/is:decision", "k3@loss/is:sequence/cap:2"]
)
@pytest.mark.parametrize("rejection", [("token_k1", "0.85_1.2"), ("seq_mean_k1", "0.9_1.1")], ids=["token", "sequence"])
def test_rejected_tokens_are_no_tokens_of_the_kl(rejection, text, group, batch, model):
    mode, threshold = rejection
    rejected = corrected(batch, rollout_rs=mode, rollout_rs_threshold=threshold)
    assert (
        0 < sum(mask.sum().item() for mask in rejected.extra["response_mask"]) < sum(len(mask) for mask in batch.masks)
    )
    value, expected, found = by_hand(model, rejected, text)
    gradient, metrics = kl_gradient(group, rejected, text)
    assert metrics["kl_loss"] == pytest.approx(value, rel=1e-5)
    assert distance(gradient, expected) < 1e-4
    assert metrics["kl/reverse_k1"] == pytest.approx(found["kl/reverse_k1"].item(), rel=1e-4)


@pytest.mark.parametrize("mode", ["token", "sequence"])
def test_rollout_is_weights_the_policy_loss_alone(mode, group, batch, model):
    weighted = corrected(batch, rollout_is=mode, rollout_is_threshold=1.2)
    weights = torch.cat(weighted.extra["rollout_is_weights"])
    assert (weights - 1).abs().max() > 0.1
    value, expected, _ = by_hand(model, batch, SPEC)
    gradient, metrics = kl_gradient(group, weighted, SPEC)
    assert metrics["kl_loss"] == pytest.approx(value, rel=1e-5)
    assert distance(gradient, expected) < 1e-4
    plain, own = group.run(None, batch), group.run(None, weighted)
    assert distance(own.gradient, plain.gradient) > 0.01, "veRL's policy loss does use them"


@pytest.mark.parametrize("mean", ["token", "sequence"])
def test_gspos_sequence_ratio_stays_with_the_policy_loss(mean, group, batch, model):
    from verl.workers.config.actor import PolicyLossConfig

    changes = {
        "policy_loss": PolicyLossConfig(loss_mode="gspo"),
        "loss_agg_mode": "token-mean" if mean == "token" else "seq-mean-token-mean",
    }
    value, expected, _ = by_hand(model, batch, SPEC, mean)
    gradient, metrics = kl_gradient(group, batch, SPEC, **changes)
    assert metrics["kl_loss"] == pytest.approx(value, rel=1e-5)
    assert distance(gradient, expected) < 1e-4


def test_bypass_mode_rejects_in_the_policy_loss_alone(group, batch, model):
    from verl.trainer.config.algorithm import RolloutCorrectionConfig
    from verl.workers.config.actor import PolicyLossConfig

    correction = RolloutCorrectionConfig(
        bypass_mode=True, rollout_is=None, rollout_rs="token_k1", rollout_rs_threshold="0.85_1.2"
    )
    policy_loss = PolicyLossConfig(loss_mode="bypass_mode", rollout_correction=correction)
    sampler = batch.log_probs["rollout_log_probs"]
    bypassed = replace(batch, log_probs={**batch.log_probs, "old_log_probs": sampler})
    text = "k2@loss/is:token/behaviour:old"  # old is the sampler's here
    value, expected, _ = by_hand(model, bypassed, SPEC)
    gradient, metrics = kl_gradient(group, bypassed, text, policy_loss=policy_loss)
    assert metrics["kl_loss"] == pytest.approx(value, rel=1e-5)
    assert distance(gradient, expected) < 1e-4
    everything = replace(correction, rollout_rs=None, rollout_rs_threshold=None)
    kept = group.run(None, bypassed, policy_loss=replace(policy_loss, rollout_correction=everything))
    rejected = group.run(None, bypassed, policy_loss=policy_loss)
    assert distance(rejected.gradient, kept.gradient) > 0.01, "veRL does reject"
