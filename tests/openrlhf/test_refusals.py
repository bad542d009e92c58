"""What is refused, with its reason: at the arguments, before a model loads or Ray starts; the rest before an update."""

import math
import os
import subprocess
import sys

import pytest
from openrlhf.trainer.ppo_utils.kl_controller import FixedKLController

from kl_plugins.adapters import receipts
from kl_plugins.adapters.log_probs import LogProbError
from kl_plugins.adapters.openrlhf import ADAPTER, HOST, attach, require_receipts
from kl_plugins.adapters.openrlhf.batch import MISSING
from kl_plugins.adapters.openrlhf.config import (
    aggregation_of,
    behaviour_source,
    needs_sampler,
    spec_of,
    statement_of,
)
from kl_plugins.receipts import MissingReceiptError
from tests.support.openrlhf import remote
from tests.support.openrlhf.command_line import (
    ADVANTAGE,
    CORRECTED,
    LOSS,
    ONE_STEP,
    REWARD,
    SAMPLER,
    SPEC,
    parse,
)
from tests.support.openrlhf.ray_support import ENVIRONMENT


@pytest.fixture(autouse=True)
def attached():
    attach()


@pytest.mark.parametrize("flags", [LOSS, SAMPLER, REWARD, ADVANTAGE, (*ADVANTAGE[:2], "--algo.kl.target", "6")])
def test_good_arguments_pass(assets, flags):
    assert str(spec_of(parse(assets, flags))) in flags


@pytest.mark.parametrize("flags", [(), (SPEC, "k3", "--algo.kl.use_loss"), ("--algo.kl.init_coef", "0")])
def test_openrlhfs_own_estimators_are_no_specs(assets, flags):
    assert spec_of(parse(assets, flags)) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (LOSS[1:], "add --algo.kl.use_loss"),
        ((*REWARD, "--algo.kl.use_loss"), "drop --algo.kl.use_loss"),
        ((*ADVANTAGE, "--algo.kl.use_loss"), "drop --algo.kl.use_loss"),
        ((*LOSS, "--algo.kl.init_coef", "0"), "init_coef is 0, so OpenRLHF loads no reference model"),
        ((*REWARD, "--algo.kl.init_coef", "0"), "init_coef is 0, so OpenRLHF loads no reference model"),
        ((*LOSS, "--algo.kl.init_coef", "-1"), "drives the policy away"),
        ((*LOSS, "--algo.kl.unbiased_gradient"), "drop it .k2@loss/is:token/cap:10/behaviour:old"),
        ((*REWARD, "--algo.kl.unbiased_gradient"), "unbiased_gradient"),
        (("--algo.kl.use_loss", SPEC, "k2@loss/beta:dual-0.1-0.01", "--algo.kl.target", "6"), "both control beta"),
        ((SPEC, "k1@advantage/future:exact"), "use an exact @loss spec"),
        ((SPEC, "exact@advantage/top"), "use an exact @loss spec"),
        ((*ADVANTAGE, "--actor.policy_loss_type", "gspo"), "ratio of the whole sequence"),
    ],
)
def test_contradictions_are_refused(assets, flags, message):
    with pytest.raises(ValueError, match=message):
        parse(assets, flags)


def test_unknown_advantage_estimators_are_refused(assets):
    args = parse(assets, ADVANTAGE)
    args.algo.advantage.estimator = "brand_new"
    with pytest.raises(ValueError, match=r"--algo\.advantage\.estimator brand_new"):
        ADAPTER.checked(args)


def test_a_bad_spec_ends_the_program_before_ray_starts(assets):
    program = "import sys; from kl_plugins.cli.app import main; sys.exit(main(sys.argv[1:]))"
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        program,
        "run",
        "openrlhf.cli.train_ppo_ray",
        SPEC,
        "k2@loss/iss:token",
    ]
    result = subprocess.run(
        command,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 2
    assert "did you mean: is" in result.stderr
    assert "Started a local Ray instance" not in result.stderr


@pytest.mark.parametrize(
    ("flags", "source", "asks"),
    [
        (LOSS, "old", False),
        ((*LOSS, *CORRECTED), "sampler", False),
        (SAMPLER, "sampler", True),
        ((*SAMPLER, *CORRECTED), "sampler", False),
        ((*SAMPLER, "--actor.policy_loss_type", "gspo"), "sampler", True),
        (("--algo.kl.use_loss", SPEC, "k2@loss/is:token/behaviour:old", *CORRECTED), "old", False),
        (("--algo.kl.use_loss", SPEC, "k2@loss"), "unused", False),
        (REWARD, "unused", False),
    ],
)
def test_where_the_behaviour_policys_log_probs_come_from(assets, flags, source, asks):
    args = parse(assets, flags)
    assert (behaviour_source(spec_of(args), args), needs_sampler(args)) == (source, asks)


def test_missing_log_probs_of_the_sampler_stop_the_run_before_the_update(harness, rollouts):
    trainer = harness.start(SAMPLER)
    with pytest.raises(LogProbError, match=r"sampler on 1 of 43 response tokens are not finite.*behaviour:old"):
        harness.train(trainer, rollouts.with_log_prob(2, 1, MISSING))
    with pytest.raises(LogProbError, match="sampler on 43 of 43 response tokens"):
        harness.train(trainer, rollouts.without_log_probs())
    harness.train(trainer, rollouts.with_log_prob(2, 1, 0.0))  # a probability of 1 is one


def test_missing_log_probs_do_not_matter_where_nothing_divides_by_them(harness, rollouts):
    flags = ("--algo.kl.use_loss", SPEC, "k2@loss/is:token/behaviour:old")
    spoilt = harness.run(flags, rollouts.with_log_prob(2, 1, math.nan)).parameters
    for name, value in harness.run(flags, rollouts).parameters.items():
        assert value.equal(spoilt[name]), name


@pytest.mark.parametrize(
    ("flags", "kind", "caveat"),
    [
        ((*LOSS, "--actor.loss_agg_mode", "seq-mean-token-mean"), "token mean", ""),
        ((*LOSS, "--actor.policy_loss_type", "gspo"), "token mean", ""),
        (ADVANTAGE, "token mean", ""),
        ((*ADVANTAGE, "--actor.loss_agg_mode", "seq-mean-token-mean"), "sequence mean", "each response y is weighted"),
        ((*REWARD, "--actor.loss_agg_mode", "seq-mean-token-mean"), "sequence mean", "each response y is weighted"),
        ((*REWARD, "--actor.policy_loss_type", "gspo"), "sequence mean", "late tokens count more"),
        ((*REWARD, "--train.agent_func_path", "agent.py"), "token mean", "an agent of your own may sample with other"),
    ],
)
def test_what_happens_to_the_terms_of_all_tokens(assets, flags, kind, caveat):
    args = parse(assets, flags)
    spec = spec_of(args)
    found = aggregation_of(spec, args)
    assert found.kind == kind
    assert ("--actor." in found.setting) == (spec.placement != "loss")
    caveats = receipts.made(HOST, spec, statement_of(spec, args), ((), "")).caveats
    assert any(caveat in text for text in caveats)
    for other in ("each response y is weighted", "late tokens count more"):
        assert caveat or not any(other in text for text in caveats)


def test_a_missing_reference_of_a_loss_is_an_error(harness, rollouts):
    trainer = harness.start(LOSS)
    trainer.experience_maker.initial_model_group = None
    with pytest.raises(RuntimeError, match="no reference log-probs for k2@loss/is:token; is there a reference model"):
        harness.train(trainer, rollouts)


def test_a_step_that_goes_round_the_check_is_an_error(harness, rollouts):
    trainer = harness.start((*LOSS, *ONE_STEP))
    harness.ask(remote.step_alone)
    with pytest.raises(Exception, match=r"did not go through DeepspeedStrategy\.optimizer_step"):
        harness.train(trainer, rollouts)


def test_workers_that_nobody_asked_refuse_to_train(harness, rollouts):
    trainer = harness.start(LOSS)
    trainer._kl_plugins.confirmed = True  # as if the trainer had asked
    with pytest.raises(Exception, match="its trainer never asked for receipts"):
        harness.train(trainer, rollouts)


def test_receipts_of_another_spec_stop_the_run_and_name_the_worker(harness, rollouts):
    trainer = harness.start(LOSS)
    trainer.args.algo.kl.estimator = "k3@loss"
    with pytest.raises(MissingReceiptError, match=r"(?s)rank 0 \(pid \d+ on .*started with k2@loss/is:token"):
        require_receipts(harness.policy, trainer.args)


def test_a_replaced_controller_is_an_error(harness, rollouts):
    trainer = harness.start(REWARD)
    trainer.experience_maker.kl_ctl = FixedKLController(0.1)
    with pytest.raises(RuntimeError, match="controller was replaced"):
        harness.train(trainer, rollouts)


def test_a_missing_reference_is_an_error(harness, rollouts):
    trainer = harness.start(REWARD)
    trainer.experience_maker.initial_model_group = None
    with pytest.raises(RuntimeError, match="is there a reference model"):
        harness.train(trainer, rollouts)
