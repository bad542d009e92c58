"""``top:`` in OpenRLHF: the reference actor gives its most probable tokens, and the policy worker trains with them.

Policy and reference are Ray actors of their own, so the numbers travel through the trainer process.
"""

import math
from unittest import mock

import numpy as np
import pytest
import ray
import torch

from kl_plugins.adapters.openrlhf.top_k import arrived, reference_numbers
from kl_plugins.adapters.top_k import KEY, packed, unpacked
from kl_plugins.patches.openrlhf import reference
from kl_plugins.receipts import MissingReceiptError
from kl_plugins.reference import reference_top_k
from kl_plugins.spec import KLSpec
from tests.support import garbage
from tests.support.openrlhf import by_hand, remote
from tests.support.openrlhf.assets import VOCABULARY
from tests.support.openrlhf.command_line import DYNAMIC, ONE_STEP, PACKED
from tests.support.openrlhf.contract_driver import by_rank, recorded

USE = ("--algo.kl.use_loss", "--algo.kl.estimator")
SPECS = (
    "exact@loss/top:8",
    "exact@loss/top:8/is:token",
    "exact@loss/top:8/is:token/floor:0.99",
    "exact@loss/top:8/is:prefix",
    "exact@loss/top:8/horizon:sequence/is:sequence",
)
MOVED = "after the policy has moved"


LORA = ("--ds.lora.rank", "4")
SPEC = "exact@loss/top:16/draws:8/is:token"
EACH = ("--train.batch_size", "8", "--train.micro_batch_size", "2")


@pytest.fixture(scope="module", autouse=True)
def by_value():
    for module in (by_hand, garbage):
        ray.cloudpickle.register_pickle_by_value(module)


def losses(harness, rollouts, assets, *flags, specs=SPECS):
    """What :func:`tests.support.openrlhf.by_hand.top_losses` finds in the worker, by spec, before and after a move."""
    trainer = harness.start((*USE, specs[0], *ONE_STEP, "--rollout.micro_batch_size", "8", *flags))
    (experience,) = trainer.experience_maker.make_experience_batch(rollouts.experiences())
    arguments = (experience, 0.5, str(assets / "reference"), KEY)
    (fresh,) = harness.ask(by_hand.top_losses, specs[:2], *arguments)
    harness.ask(by_hand.move, 0.004)
    (moved,) = harness.ask(by_hand.top_losses, specs, *arguments)
    return dict(zip([*specs[:2], *((text, MOVED) for text in specs)], [*fresh, *moved], strict=True))


@pytest.fixture(scope="module")
def computed(harness, rollouts, assets):
    return losses(harness, rollouts, assets)


@pytest.mark.parametrize("case", [*SPECS[:2], *((text, MOVED) for text in SPECS)], ids=str)
def test_the_gradient_is_that_of_set_bucket_and_remainder(computed, case):
    gap, size, kl, in_bucket, weight, missed = computed[case]
    assert gap < 1e-5
    assert size > 1e-3
    assert kl > 0.01
    assert 0.2 < in_bucket < 1
    assert (weight > 0.05) == (MOVED in case)
    assert abs(missed) < 1e-6


@pytest.mark.parametrize("flags", [(), LORA], ids=["full", "lora"])
def test_the_gradient_with_draws_is_that_of_the_core(flags, harness, rollouts, assets):
    """From the numbers that the experience carries; it differs from the one without draws."""
    drawn = [f"{SPECS[0]}/draws:6", f"{SPECS[0]}/draws:6/is:token"]
    found = losses(harness, rollouts, assets, *flags, specs=drawn)
    without = losses(harness, rollouts, assets, *flags, specs=SPECS[:2])
    for gap, size, *_ in found.values():
        assert gap < 1e-4
        assert size > 1e-3
    for drawn_size, size in zip(found.values(), without.values(), strict=True):
        assert abs(drawn_size[1] / size[1] - 1) > 1e-3


def test_numbers_are_those_of_the_response_tokens_states():
    # A response of several turns, one without tokens of the policy, and one of a single token; all of other lengths.
    logits, mask = torch.randn(3, 9, 20), torch.zeros(3, 8, dtype=torch.long)
    mask[0, [2, 3, 6]], mask[2, 7] = 1, 1
    attention = torch.ones(3, 9, dtype=torch.long)
    attention[0, 8:], attention[1, 5:] = 0, 0
    sequences, rows = torch.randint(0, 20, (3, 9)), mask.bool()
    every = logits[:, :-1].log_softmax(-1)
    logp = every.gather(-1, sequences[:, 1:, None])[..., 0]
    expected = packed(reference_top_k(logits[:, :-1][rows], 4))
    for given in (logits, logits[attention.bool()][None]):
        found = reference_numbers(given, logp, sequences, mask, attention, 4)
        assert torch.equal(found[:, :4], expected[:, :4])
        torch.testing.assert_close(found, expected)
        more = reference_numbers(given, logp, sequences, mask, attention, 4, 3)
        assert torch.equal(more[:, :9], found)
        draws = unpacked(more, draws=3).draws
        ours = every[rows].gather(-1, draws.ids)
        torch.testing.assert_close(draws.logp[draws.log_rate < 1e4], ours[draws.log_rate < 1e4])
    assert reference_numbers(logits, logp, sequences, 0 * mask, attention, 4).shape == (0, 9)
    assert reference_numbers(logits, logp, sequences, 0 * mask, attention, 4, 3).shape == (0, 19)


def test_under_lora_it_is_the_same(harness, rollouts, assets):
    # OpenRLHF's reference actor has no adapter.
    for gap, size, *_ in losses(harness, rollouts, assets, *LORA).values():
        assert gap < 1e-5
        assert size > 1e-3


def update(harness, rollouts, text, *flags):
    """One optimizer step under an exact spec, where policy workers with a copy take the reference actor's weights."""
    trainer = harness.start((*USE, text, *EACH, "--train.max_epochs", "1", *flags))
    harness.ask(by_hand.name_reference, str(harness.assets / "reference"))
    harness.receipts(trainer)
    (metrics,), _ = harness.train(trainer, rollouts)
    return harness.ask(remote.state)[0][1], metrics


def distance(found, expected):
    """Return the relative distance of two gradients."""
    gap = sum((found[name] - values).square().sum() for name, values in expected.items())
    return float((gap / sum(values.square().sum() for values in expected.values())).sqrt())


@pytest.fixture(scope="module")
def whole(harness, rollouts):
    """The gradient under ``exact@loss``, and what OpenRLHF logs."""
    return update(harness, rollouts, "exact@loss")


WHOLE = f"exact@loss/top:{VOCABULARY}"


def test_with_the_whole_vocabulary_kept_it_is_exact(harness, rollouts, whole):
    gradient, metrics = update(harness, rollouts, WHOLE)
    assert distance(gradient, whole[0]) < 1e-3
    assert metrics["kl/exact"] == pytest.approx(whole[1]["kl/exact"], rel=1e-4)
    assert metrics["kl/value"] == metrics["kl/exact"] > 0.01


@pytest.mark.parametrize("text", ["exact@loss", WHOLE])
def test_packing_changes_nothing(packing, rollouts, whole, text):
    gradient, metrics = update(packing, rollouts, text, *PACKED)
    assert distance(gradient, whole[0]) < 0.05  # bfloat16, added up in another order
    assert metrics["kl/exact"] == pytest.approx(whole[1]["kl/exact"], rel=0.02)


@pytest.mark.parametrize("flags", [DYNAMIC, (*PACKED, *DYNAMIC)], ids=["padded", "packed"])
def test_micro_batches_of_any_size_are_the_same_with_and_without_a_copy(packing, rollouts, whole, flags):
    (copy, metrics), (top, _) = (update(packing, rollouts, text, *flags) for text in ("exact@loss", WHOLE))
    assert distance(top, copy) < 1e-3
    assert metrics["kl/exact"] == pytest.approx(whole[1]["kl/exact"], rel=0.02)


def test_the_numbers_stay_with_their_tokens_when_batches_are_shuffled(harness, rollouts):
    # Two epochs of four micro-batches each. Numbers of other tokens would stop the run, as the next test shows.
    (metrics,) = harness.run((*USE, SPEC), rollouts).metrics
    assert metrics["kl/active"] == 1
    assert metrics["kl/value"] > 0.01
    assert KEY not in metrics


def moved_by_one(parts):
    return [*parts[:-1], np.roll(parts[-1], 1, 0)]


def swapped(parts):
    return parts[::-1]


@pytest.mark.parametrize("change", [moved_by_one, swapped])
def test_numbers_of_other_tokens_stop_both_ranks(pair, rollouts, change):
    trainer = pair.start((*USE, SPEC, *EACH))
    pair.receipts(trainer)
    make = trainer.experience_maker.make_experience_batch

    def spoilt(samples):
        made = make(samples)
        made[-1].info[KEY] = change(made[-1].info[KEY])
        return made

    trainer.experience_maker.make_experience_batch = spoilt
    with recorded(pair) as fits, pytest.raises(ray.exceptions.RayTaskError):
        trainer.train_step(rollouts.experiences(), 0)
    first, second = by_rank(fits)
    assert first == second
    assert "most probable tokens do not fit the log-probs of OpenRLHF's reference actor" in first


def test_two_ranks_train_as_one(pair, harness, rollouts):
    # Without draws, which are others if the reference scores the sequences in other batches.
    flags = (*USE, "exact@loss/top:64/is:token", *EACH, "--train.max_epochs", "1")
    one, two = (where.run(flags, rollouts) for where in (harness, pair))
    assert distance(two.gradient, one.gradient) < 0.02
    assert two.metrics[-1]["kl/value"] == pytest.approx(one.metrics[-1]["kl/value"], rel=0.02)


def counted(harness, rollouts, text):
    """Shapes of the forward passes of reference and policy in one training step, and whether a copy was loaded."""
    trainer = harness.start((*USE, text, *ONE_STEP))
    harness.receipts(trainer)
    for ask in (harness.ask, harness.ask_reference):
        ask(by_hand.count_passes)
    harness.train(trainer, rollouts)
    return harness.ask_reference(by_hand.passes), harness.ask(by_hand.passes)


def test_no_pass_and_no_copy_of_the_reference_is_added(harness, rollouts):
    sampled, top = (counted(harness, rollouts, text) for text in ("k2@loss", SPEC))
    assert top[0] == sampled[0]
    assert len(top[0][0][0]) == 4
    ((policy, copy),) = top[1]
    assert sorted(policy) == sorted(sampled[1][0][0])
    assert not copy


def test_a_step_leaves_nothing_to_the_garbage_collector(harness, rollouts):
    trainer = harness.start((*USE, SPEC, *ONE_STEP))
    harness.receipts(trainer)
    harness.train(trainer, rollouts)
    for ask in (harness.ask, harness.ask_reference):
        ask(garbage.watch)
    harness.train(trainer, rollouts)
    assert [ask(garbage.watched) for ask in (harness.ask, harness.ask_reference)] == [[[]], [[]]]


def test_a_run_resumes(harness, rollouts, tmp_path):
    flags = (*USE, SPEC, "--ckpt.path", str(tmp_path), "--ckpt.save_steps", "1")
    trainer = harness.start(flags)
    harness.train(trainer, rollouts)
    trainer.save_logs_and_checkpoints(1, {}, {"episode": 0, "global_step": 1})
    resumed = harness.start((*flags, "--ckpt.load_enable"))
    assert resumed.init_checkpoint_states()["global_step"] == 1
    (metrics,), _ = harness.train(resumed, rollouts)
    assert metrics["kl/active"] == 1
    assert math.isfinite(metrics["kl/value"])


def test_the_receipt_says_what_it_costs(harness):
    (receipt,) = harness.receipts(harness.start((*USE, SPEC)))
    assert receipt.cost == "2 k + 3 m + 2 = 58 numbers per response token from the reference actor's own pass"


def test_a_reference_actor_without_kl_plugins_stops_the_run(harness, rollouts):
    trainer = harness.start((*USE, SPEC))
    harness.ask_reference(by_hand.detach_plugin)
    try:
        with pytest.raises(
            MissingReceiptError, match=r"(?s)rank 0 \(pid \d+ on .*OpenRLHF's reference model.* 16 most"
        ):
            harness.train(trainer, rollouts)
    finally:
        harness.ask_reference(by_hand.attach_plugin)


def test_a_reference_actor_with_another_spec_is_named(harness, rollouts):
    trainer = harness.start((*USE, "k2@loss"))
    trainer.args.algo.kl.estimator = SPEC
    with pytest.raises(MissingReceiptError, match=rf"it was started with k2@loss, not with {SPEC}"):
        reference.require_recorders(trainer.experience_maker, KLSpec.parse(SPEC))


def broken(process, k, draws):
    raise ValueError("it cannot begin")


def test_a_reference_actor_that_cannot_begin_stops_the_run(harness, rollouts):
    trainer = harness.start((*USE, SPEC))
    harness.receipts(trainer)
    with (
        mock.patch("kl_plugins.patches.openrlhf.reference.start", broken),
        pytest.raises(ray.exceptions.RayTaskError, match="it cannot begin"),
    ):
        harness.train(trainer, rollouts)


def test_passes_without_numbers_stop_the_run(harness, rollouts):
    trainer = harness.start((*USE, SPEC))
    samples = rollouts.experiences()
    with pytest.raises(
        RuntimeError, match="for 0 batches with 0 response tokens, but the rollout has 8 batches with 43"
    ):
        reference.collect(trainer.experience_maker, KLSpec.parse(SPEC), samples, [])
    with pytest.raises(RuntimeError, match="a micro-batch arrived without the reference's most probable tokens"):
        arrived(KLSpec.parse(SPEC), samples[0])
