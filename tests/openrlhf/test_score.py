"""``@reward`` and ``@advantage`` in OpenRLHF's real experience maker, with its real policy and reference."""

import copy

import pytest
import ray
import torch
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ppo_utils.kl_controller import FixedKLController

from kl_plugins import KLSpec, kl_penalty
from kl_plugins.adapters.controller import BetaChangedError
from kl_plugins.adapters.openrlhf.config import reward_site
from kl_plugins.adapters.openrlhf.refusals import ADVANTAGE_ESTIMATORS
from kl_plugins.controllers import LARGEST_OBSERVED
from tests.support.openrlhf import by_hand
from tests.support.openrlhf.command_line import ADVANTAGE, REWARD, SPEC

BETA, GAMMA, LAMBD = 0.3, 0.9, 0.8


@pytest.fixture(scope="module")
def started(harness):
    """A trainer under a score spec, for its strategy and tokenizer."""
    return harness.start(REWARD)


def made(started, harness, rollouts, text, estimator, split=3):
    """The host's experiences under a spec, and the reference's log-probs of each; ``split`` samples per batch."""
    strategy = copy.copy(started.strategy)
    strategy.args = args = copy.deepcopy(started.args)
    args.algo.kl.estimator, args.algo.advantage.estimator = text, estimator
    args.algo.advantage.gamma, args.algo.advantage.lambd = GAMMA, LAMBD
    args.rollout.micro_batch_size = split
    control = FixedKLController(BETA)
    maker = RemoteExperienceMaker(harness.policy, None, None, harness.reference, control, strategy, started.tokenizer)
    batches = maker.make_experience(maker.split_rollout_samples(rollouts.experiences()))
    random = torch.Generator().manual_seed(2)
    for batch in batches:
        batch.values = torch.randn(batch.action_mask.shape, generator=random)
    kept = [copy.copy(batch) for batch in batches]
    references = ray.get(
        harness.reference.async_run_method_batch(
            "forward",
            sequences=[b.sequences for b in batches],
            action_mask=[b.action_mask for b in batches],
            attention_mask=[b.attention_mask for b in batches],
        )
    )[0]
    return maker, kept, references, maker.compute_advantages_and_returns(batches)


def by_sequence(batches, read):
    """Rows of ``read(batch)`` of all batches, each as long as its own batch, as lists."""
    return [row.tolist() for batch in batches for row in read(batch).double()]


def advantages_by_hand(estimator, kept, penalties, rewards):
    return by_hand.advantages(
        estimator,
        rewards,
        [row.tolist() for penalty in penalties for row in penalty.double()],
        by_sequence(kept, lambda batch: batch.action_mask),
        BETA,
        group=2,
        gamma=GAMMA,
        lambd=LAMBD,
        values=by_sequence(kept, lambda batch: batch.values),
    )


def penalties_of(text, kept, references):
    spec = KLSpec.parse(text)
    pairs = zip(kept, references, strict=True)
    return [kl_penalty(spec, batch.action_log_probs, ref, batch.action_mask.bool()) for batch, ref in pairs]


def assert_close(experiences, rows):
    found = by_sequence(experiences, lambda batch: batch.advantages)
    masks = by_sequence(experiences, lambda batch: batch.action_mask)
    for row, expected, mask in zip(found, rows, masks, strict=True):
        live = [(a, b) for a, b, on in zip(row, expected, mask, strict=True) if on]
        assert [a for a, _ in live] == pytest.approx([b for _, b in live], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("estimator", ADVANTAGE_ESTIMATORS)
@pytest.mark.parametrize("text", ["k1@advantage", "k1@advantage/gamma:0.5/future:k3", "k1@advantage/horizon:token"])
def test_advantage_is_subtracted_after_normalisation(started, harness, rollouts, estimator, text):
    _, kept, references, experiences = made(started, harness, rollouts, text, estimator)
    penalties = penalties_of(text, kept, references)
    stock = advantages_by_hand(estimator, kept, [0 * penalty for penalty in penalties], rollouts.rewards)
    rows = [row for penalty in penalties for row in penalty.double().tolist()]
    expected = [[a - BETA * p for a, p in zip(*pair, strict=True)] for pair in zip(stock, rows, strict=True)]
    assert_close(experiences, expected)
    assert max(abs(p) for row in rows for p in row) > 0.5


@pytest.mark.parametrize("estimator", ADVANTAGE_ESTIMATORS)
@pytest.mark.parametrize("text", ["k1@reward", "k2@reward/allow:biased"])
def test_reward_goes_into_token_rewards(started, harness, rollouts, estimator, text):
    _, kept, references, experiences = made(started, harness, rollouts, text, estimator)
    penalties = penalties_of(text, kept, references)
    assert_close(experiences, advantages_by_hand(estimator, kept, penalties, rollouts.rewards))


@pytest.mark.parametrize("estimator", ADVANTAGE_ESTIMATORS)
def test_k1_in_reward_is_openrlhfs_own(started, harness, rollouts, estimator):
    _, hosts, _, native = made(started, harness, rollouts, "k1", estimator)
    _, ours, _, under_spec = made(started, harness, rollouts, "k1@reward", estimator)
    for a, b in zip(hosts, ours, strict=True):
        assert a.kl.equal(b.kl)
        assert a.info["kl"].equal(b.info["kl"])
    for a, b in zip(native, under_spec, strict=True):
        assert a.advantages.equal(b.advantages)
        assert a.returns.equal(b.returns)


def test_the_logged_kl_of_an_advantage_spec_is_that_of_each_token(started, harness, rollouts):
    _, kept, references, _ = made(started, harness, rollouts, "k1@advantage", "group_norm")
    for batch, reference in zip(kept, references, strict=True):
        mask = batch.action_mask
        expected = ((batch.action_log_probs - reference) * mask).sum(-1) / mask.sum(-1)
        assert batch.info["kl"].tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)
    assert all(batch.base_action_log_probs is None for batch in kept)  # as OpenRLHF leaves them without a KL loss


def test_the_critics_returns_hold_no_advantage_penalty(started, harness, rollouts):
    _, _, _, with_penalty = made(started, harness, rollouts, "k1@advantage", "gae")
    _, kept, _, _ = made(started, harness, rollouts, "k1@reward", "gae")
    zeros = [torch.zeros_like(batch.values) for batch in kept]
    masks = by_sequence(kept, lambda batch: batch.action_mask)
    rewards = by_hand.token_rewards(rollouts.rewards, [row.tolist() for zero in zeros for row in zero], masks, 0.0)
    values = by_sequence(kept, lambda batch: batch.values)
    for row, value, mask, found in zip(
        rewards, values, masks, by_sequence(with_penalty, lambda batch: batch.returns), strict=True
    ):
        running = 0.0
        for t in reversed(range(len(row))):
            following = value[t + 1] * mask[t + 1] if t + 1 < len(row) else 0.0
            running = row[t] + GAMMA * following - value[t] * mask[t] + GAMMA * LAMBD * running
            if mask[t]:
                assert found[t] == pytest.approx(running + value[t], rel=1e-4, abs=1e-5)


def log_ratios(harness, experiences):
    """log(policy / reference) of all response tokens of a rollout batch, float64."""
    references = ray.get(
        harness.reference.async_run_method_batch(
            "forward",
            sequences=[b.sequences for b in experiences],
            action_mask=[b.action_mask for b in experiences],
            attention_mask=[b.attention_mask for b in experiences],
        )
    )[0]
    pairs = zip(experiences, references, strict=True)
    return torch.cat([(batch.action_log_probs - ref)[batch.action_mask.bool()] for batch, ref in pairs]).double()


def test_metrics_are_those_of_the_whole_rollout(harness, rollouts):
    result = harness.run((*ADVANTAGE,), rollouts)
    (metrics,) = result.metrics
    u = log_ratios(harness, result.experiences)
    assert metrics["kl/reverse_k1"] == pytest.approx(u.mean().item(), rel=1e-4)
    assert metrics["kl/value"] == pytest.approx((torch.exp(-u) - 1 + u).mean().item(), rel=1e-4)
    assert metrics["kl/log_ratio/max"] == pytest.approx(u.abs().max().item(), rel=1e-5)
    assert (metrics["kl/active"], metrics["kl/beta"], metrics["kl/ess"]) == (1, 0.5, pytest.approx(1))


def test_the_specs_own_beta_moves_once_per_rollout_batch(harness, rollouts):
    result = harness.run((SPEC, "k1@reward/beta:linear-1-0-4"), rollouts, steps=3)
    assert [metrics["kl/beta"] for metrics in result.metrics] == [1, 0.75, 0.5]
    result = harness.run((SPEC, "k1@reward/beta:dual-0.1-0.01"), rollouts)
    u = log_ratios(harness, result.experiences)
    observed = (torch.exp(-u) - 1 + u).clamp_max(LARGEST_OBSERVED).mean().item()
    assert result.trainer.kl_ctl.value == pytest.approx(0.5 + 0.01 * (observed - 0.1), rel=1e-4)


def test_a_checkpoint_holds_the_controller_and_resume_restores_it(harness, rollouts, tmp_path):
    checkpoints = ("--ckpt.path", str(tmp_path), "--ckpt.save_steps", "1")
    flags = (SPEC, "k1@reward/beta:linear-1-0-4", *checkpoints)
    trainer = harness.start(flags)
    trainer.init_checkpoint_states()
    harness.train(trainer, rollouts, steps=2)
    trainer.save_logs_and_checkpoints(2, {}, {"episode": 0, "global_step": 2})
    resumed = harness.start((*flags, "--ckpt.load_enable"))
    resumed.init_checkpoint_states()
    assert resumed.kl_ctl.controller.state == trainer.kl_ctl.controller.state
    assert resumed.kl_ctl.value == 0.5
    assert harness.train(resumed, rollouts)[0][0]["kl/beta"] == 0.5


def test_openrlhfs_adaptive_beta_is_kept_over_a_resume(harness, rollouts, tmp_path):
    checkpoints = ("--ckpt.path", str(tmp_path), "--ckpt.save_steps", "1")
    flags = (*REWARD, "--algo.kl.target", "6", "--algo.kl.horizon", "80", *checkpoints)
    trainer = harness.start(flags)
    harness.train(trainer, rollouts)
    assert trainer.kl_ctl.value == pytest.approx(0.5 * (1 - 0.2 * 8 / 80))
    trainer.save_logs_and_checkpoints(1, {}, {"episode": 0, "global_step": 1})
    resumed = harness.start((*flags, "--ckpt.load_enable"))
    resumed.init_checkpoint_states()
    assert resumed.kl_ctl.value == trainer.kl_ctl.value


@pytest.mark.parametrize("estimator", ADVANTAGE_ESTIMATORS)
def test_the_receipt_says_what_openrlhf_does_with_the_kl(started, capsys, harness, rollouts, estimator):
    made(started, harness, rollouts, "k1@reward", estimator)
    shown = capsys.readouterr().err
    assert "kl-plugins: k1@reward active in OpenRLHF" in shown
    args = copy.deepcopy(started.args)
    args.algo.advantage.estimator = estimator
    assert f"reward site: {reward_site(KLSpec.parse('k1@reward'), args)}" in shown
    assert "aggregation token mean (--actor.loss_agg_mode token-mean), sampling: the whole distribution" in shown


def test_a_changed_coefficient_is_used_and_shown(harness, rollouts):
    trainer = harness.start(ADVANTAGE)
    found = {}
    for beta in (0.5, 0.25, 0.0):
        trainer.kl_ctl.value = beta
        made = trainer.experience_maker.make_experience_batch(rollouts.experiences())
        found[beta] = torch.cat([batch.advantages.flatten() for batch in made])
        assert trainer.kl_ctl.metrics.total()["kl/beta"] == beta
    assert (found[0.5] - found[0.0]).abs().max() > 0.5
    torch.testing.assert_close(found[0.25], (found[0.5] + found[0.0]) / 2)


def test_a_changed_coefficient_beside_a_schedule_stops_the_run(harness, rollouts):
    trainer = harness.start((SPEC, "k1@reward/beta:linear-0.5-0-4"))
    harness.train(trainer, rollouts)
    trainer.kl_ctl.value = 0.25
    with pytest.raises(BetaChangedError, match=r"--algo\.kl\.init_coef was changed from 0\.5 to 0\.25"):
        harness.train(trainer, rollouts)
