"""``observe`` in OpenRLHF against processes without kl-plugins; the contract has more about the loss."""

import pytest
import torch

from kl_plugins import KLSpec, kl_penalty
from kl_plugins.adapters.openrlhf.explained.defaults import DEFAULTS
from kl_plugins.adapters.openrlhf.observe import WORDS, default_word, observation_of
from kl_plugins.metrics import penalty_metrics
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
    ours = harness.run([SPEC, "k1/observe:k1@advantage"], rollouts)
    made = ours.experiences
    logp, ref = (
        torch.cat([getattr(one, name).flatten() for one in made])[None]
        for name in ("action_log_probs", "base_action_log_probs")
    )
    mask = torch.cat([one.action_mask.flatten() for one in made])[None].bool()
    found = ours.metrics[0]
    u = (logp - ref)[mask].double()
    assert found["kl/reverse_k1"] == pytest.approx(u.mean().item(), rel=1e-5)
    assert found["kl/log_ratio/max"] == pytest.approx(u.abs().max().item(), rel=1e-5)
    assert found["kl/beta"] == ours.trainer.kl_ctl.value
    spec = KLSpec.parse("k1@reward")  # the largest penalty of a single token is that of its own term
    penalty = kl_penalty(spec, logp, ref, mask)
    own = penalty_metrics(penalty, logp, ref, None, mask)
    assert found["kl/value"] == pytest.approx(own["kl/value"].item(), rel=1e-4)
    assert found["kl/coef/max"] > own["kl/coef/max"]


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
