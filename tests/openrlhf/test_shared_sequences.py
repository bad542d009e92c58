"""Workers that share each sequence, by tensor parallelism or by ring attention, train as one worker does."""

import math

import pytest
import ray

from tests.support.openrlhf.command_line import ONE_STEP, SPEC
from tests.support.openrlhf.contract_driver import by_rank, recorded
from tests.support.openrlhf.shared import ROUNDING

USE = ("--algo.kl.use_loss", SPEC)


def check_metrics(one, two, rounding):
    ours = {key: value for key, value in one.metrics[0].items() if key.startswith("kl")}
    assert len(ours) > 10
    assert {key: two.metrics[0][key] for key in ours} == pytest.approx(ours, rel=rounding, abs=rounding)


@pytest.mark.parametrize("flags", [(*USE, "k2@loss/is:prefix/behaviour:sampler/cap:5"), (SPEC, "k1@reward")])
def test_two_workers_train_as_one(sharing, flags):
    one, two = sharing.both((*flags, *ONE_STEP))
    assert sharing.distance(one) < ROUNDING[sharing.mode]
    check_metrics(one, two, ROUNDING[sharing.mode])


def test_tokens_are_counted_once(sharing):
    trainer = sharing.start((*USE, "k2@loss", *ONE_STEP))
    make = trainer.experience_maker.make_experience_batch

    def spoilt(samples):
        made = make(samples)
        made[-1].base_action_log_probs[-1, int(made[-1].action_mask[-1].nonzero()[1])] = math.nan
        return made

    trainer.experience_maker.make_experience_batch = spoilt
    with recorded(sharing.two) as fits, pytest.raises(ray.exceptions.RayTaskError):
        trainer.train_step(sharing.rollouts.experiences(), 0)
    first, second = by_rank(fits)
    assert first == second
    assert "the log-probs of the reference on 1 of 43 response tokens are not finite" in first
