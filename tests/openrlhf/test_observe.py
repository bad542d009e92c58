"""``observe`` in OpenRLHF against processes without kl-plugins; the contract has more about the loss."""

import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from kl_plugins import KLSpec, kl_penalty
from kl_plugins.adapters.openrlhf import exact as observe_exact
from kl_plugins.adapters.openrlhf import observe
from kl_plugins.adapters.openrlhf.batch import MicroBatch
from kl_plugins.adapters.openrlhf.explained.defaults import DEFAULTS
from kl_plugins.adapters.openrlhf.observe import WORDS, default_word, observation_of
from kl_plugins.adapters.top_k import KEY
from kl_plugins.adapters.top_k import packed as packed_numbers
from kl_plugins.reference import reference_top_k
from tests.support.openrlhf import remote
from tests.support.openrlhf.command_line import ONE_STEP, SPEC, parse
from tests.support.openrlhf.harness import LOSS, STOCK


def observing(flags, text):
    """Flags of the host's own KL with ``observe`` after its word."""
    found = list(flags)
    if SPEC not in found:
        return [*found, SPEC, text.removeprefix("/")]
    place = found.index(SPEC) + 1
    return [*found[:place], found[place] + text, *found[place + 1 :]]


TOP = "exact@loss/top:8/is:token"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *((name, "/observe/probe:1" if index else "/observe:k2@loss") for index, name in enumerate(STOCK)),
        ("k3 loss", f"/observe:{TOP}/probe:1"),
        ("k2 loss unbiased", f"/observe:{TOP}"),
    ],
)
def test_training_is_stock_bit_by_bit(name, text, harness, rollouts, stock):
    ours, theirs = harness.run(observing(STOCK[name], text), rollouts), stock[name]
    for parameter, values in theirs["parameters"].items():
        assert torch.equal(ours.parameters[parameter], values), parameter
    for mine, other in zip(ours.metrics, theirs["metrics"], strict=True):
        own = {key: value for key, value in mine.items() if not key.startswith("kl/")}
        assert own.keys() == other.keys()
        for key in own:
            assert key.startswith("timing/") or own[key] == other[key], key
        assert mine["kl/observed"] == mine["kl/active"] == 1
        assert mine["kl/value"] > 0
        assert ("kl/probe/host/cosine" in mine) is text.endswith("probe:1")


@pytest.mark.parametrize(
    ("spec", "cost"), [(TOP, "2 k + 1 = 17"), ("exact@loss/top:8/draws:4/is:token", "2 k + 3 m + 2 = 30")]
)
def test_numbers_of_top_are_those_of_the_spec_that_trains(spec, cost, harness, rollouts):
    applied = harness.run([*LOSS, spec, *ONE_STEP], rollouts).metrics[0]
    result = harness.run([*LOSS, f"k3/observe:{spec}/probe:1", *ONE_STEP], rollouts)
    found, ours = result.metrics[0], {key: value for key, value in applied.items() if key.startswith("kl/")}
    assert {key: found[key] for key in ours} == ours
    assert ours["kl/exact"] > 0.01
    assert ours["kl/coef/max"] > 0
    probes = {key: value for key, value in found.items() if key.startswith("kl/probe/")}
    assert {f"kl/probe/{name}/cosine" for name in ("host", "k1", "k2", "k3")} <= set(probes)
    assert all(map(math.isfinite, probes.values()))
    (receipt,) = result.receipts
    assert receipt.cost == f"{cost} numbers per response token from the reference actor's own pass"


def moved(experiences):
    info = experiences[-1].info
    info[KEY] = [*info[KEY][:-1], np.roll(info[KEY][-1], 1, 0)]


def shortened(experiences):
    info = experiences[-1].info
    info[KEY] = [*info[KEY][:-1], info[KEY][-1][1:]]


def dropped(experiences):
    for one in experiences:
        del one.info[KEY]


@pytest.mark.parametrize("change", [moved, shortened, dropped])
def test_numbers_of_no_use_are_left_out_and_do_not_stop_the_run(change, harness, rollouts, stock):
    trainer = harness.start([*LOSS, "k3/observe:exact@loss/top:64/probe:1"])
    harness.receipts(trainer)
    make = trainer.experience_maker.make_experience_batch

    def spoilt(samples):
        made = make(samples)
        change(made)
        return made

    trainer.experience_maker.make_experience_batch = spoilt
    (metrics,), _ = harness.train(trainer, rollouts)
    (parameters, _), *_ = harness.ask(remote.state)
    assert all(torch.equal(parameters[name], value) for name, value in stock["k3 loss"]["parameters"].items())
    assert 0 <= metrics["kl/observed"] < 1
    assert (metrics["kl/observed"] > 0) is (change is not dropped)
    assert math.isfinite(metrics["kl/exact"])


def nothing(process):
    return []


def test_passes_without_numbers_do_not_stop_the_run(harness, rollouts, stock):
    trainer = harness.start([*LOSS, f"k3/observe:{TOP}"])
    harness.receipts(trainer)
    with mock.patch("kl_plugins.patches.openrlhf.reference.stop", nothing):
        (metrics,), _ = harness.train(trainer, rollouts)
    assert metrics["kl/observed"] == 0
    (parameters, _), *_ = harness.ask(remote.state)
    assert all(torch.equal(parameters[name], value) for name, value in stock["k3 loss"]["parameters"].items())


@pytest.mark.parametrize("packed", [False, True])
def test_a_probe_of_top_by_hand(packed):
    """Products of gradients by all logits, of the definition."""
    logits, ref = torch.randn(2, 9, 20).double(), torch.randn(2, 9, 20).double()
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, [1, 2, 5]], mask[1, :4] = True, True
    attention = torch.ones(2, 9, dtype=torch.long)
    attention[1, 7:] = 0
    sequences, states = torch.randint(0, 20, (2, 9)), slice(2, 8)
    drawn = sequences[:, 3:]
    ref_logp = ref[:, states].log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
    kept = reference_top_k(ref[:, states][mask], 4)
    session = SimpleNamespace(spec=KLSpec.parse("exact@loss/top:4"), probing=True)
    batch = MicroBatch(session, mask, None, None, numbers=packed_numbers(kept))
    experience = SimpleNamespace(sequences=sequences, attention_mask=attention, base_action_log_probs=ref_logp)
    logp = logits[:, states].log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
    shown = logits[attention.bool()][None] if packed else logits
    assert observe_exact.measure_states(batch, logp, shown, experience) is None
    leaf = logits[:, states][mask].requires_grad_()
    policy, reference, labels = leaf.log_softmax(-1), ref[:, states][mask].log_softmax(-1), drawn[mask]
    p, r = policy.gather(-1, kept.ids).exp(), reference.gather(-1, kept.ids).exp()
    rest, ref_rest = 1 - p.sum(-1), 1 - r.sum(-1)
    terms = (p * (p / r).log()).sum(-1) + rest * (rest / ref_rest).log(), policy.gather(-1, labels[:, None])
    vectors = []
    for term in terms:
        (gradient,) = torch.autograd.grad(term.sum(), leaf, retain_graph=True)
        kept_part = gradient.gather(-1, kept.ids)
        vectors.append(torch.cat([kept_part, (gradient.sum(-1) - kept_part.sum(-1))[:, None]], -1))
    products = [(one * other).sum(-1) for one, other in ((vectors[0],) * 2, vectors, (vectors[1],) * 2)]
    for found, expected in zip(batch.cells, products, strict=True):
        torch.testing.assert_close(found[mask], expected, rtol=1e-4, atol=1e-5, check_dtype=False)
        assert not found[~mask].any()
    assert batch.exact[mask].isfinite().all()


def test_the_reward_by_hand(harness, rollouts):
    with mock.patch.object(observe, "measured", wraps=observe.measured) as measured:
        ours = harness.run([SPEC, "k1/observe:k1@advantage"], rollouts)
    batches = [call.args[1:4] for call in measured.call_args_list]
    assert sum(len(mask) for _, _, mask in batches) == len(rollouts.rewards)
    u = torch.cat([(logp - ref)[mask] for logp, ref, mask in batches]).double()
    penalties = [kl_penalty(KLSpec.parse("k1@advantage"), *batch) for batch in batches]
    found = ours.metrics[0]
    assert found["kl/reverse_k1"] == pytest.approx(u.mean().item(), rel=1e-5)
    assert found["kl/value"] == pytest.approx((u.neg().exp() - 1 + u).mean().item(), rel=1e-4)
    assert found["kl/coef/max"] == pytest.approx(max(penalty.abs().max().item() for penalty in penalties), rel=1e-5)
    assert found["kl/beta"] == ours.trainer.kl_ctl.value


def test_the_words_and_the_default_are_openrlhfs(assets):
    assert default_word() == DEFAULTS["algo.kl.estimator"] == parse(assets, []).algo.kl.estimator
    assert str(observation_of(parse(assets, [SPEC, "observe"]))) == f"{default_word()}/observe"
    for word in WORDS:
        assert parse(assets, [SPEC, word]).algo.kl.estimator == word


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([SPEC, "k3/observe", "--algo.kl.init_coef", "0"], "is 0, so OpenRLHF loads no reference model"),
        ([SPEC, "k9/observe"], "'k9' before observe is not one of OpenRLHF's estimators"),
        ([SPEC, "k3/observe:k2@loss/is:token/behaviour:sampler"], "for which OpenRLHF does not ask by itself"),
        ([SPEC, f"k3/observe:{TOP}"], "exact terms need the policy's logits, which OpenRLHF has only while it trains"),
    ],
)
def test_refusals(flags, says, assets):
    with pytest.raises(ValueError, match=says):
        parse(assets, flags)


def test_a_typo_ends_the_parser(assets, capfd):
    with pytest.raises(SystemExit):
        parse(assets, [SPEC, "k3/observe:k2@los"])
    assert "did you mean: loss" in capfd.readouterr().err
