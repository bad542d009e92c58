"""``observe`` in OpenRLHF against processes without kl-plugins; the contract has more about the loss."""

from unittest import mock

import pytest
import torch

from kl_plugins import KLSpec, kl_penalty
from kl_plugins.adapters.openrlhf import observe
from kl_plugins.adapters.openrlhf.explained.defaults import DEFAULTS
from kl_plugins.adapters.openrlhf.observe import WORDS, default_word, observation_of
from tests.support.openrlhf.command_line import SPEC, parse
from tests.support.openrlhf.harness import STOCK


def observing(flags, text):
    """Flags of the host's own KL with ``observe`` after its word."""
    found = list(flags)
    if SPEC not in found:
        return [*found, SPEC, text.removeprefix("/")]
    place = found.index(SPEC) + 1
    return [*found[:place], found[place] + text, *found[place + 1 :]]


@pytest.mark.parametrize(
    ("name", "text"), [(name, "/observe/probe:1" if index else "/observe:k2@loss") for index, name in enumerate(STOCK)]
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
    ],
)
def test_refusals(flags, says, assets):
    with pytest.raises(ValueError, match=says):
        parse(assets, flags)


def test_a_typo_ends_the_parser(assets, capfd):
    with pytest.raises(SystemExit):
        parse(assets, [SPEC, "k3/observe:k2@los"])
    assert "did you mean: loss" in capfd.readouterr().err
