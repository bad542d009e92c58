"""Workers that share each sequence, by tensor parallelism or by ring attention, train as one worker does."""

import math

import numpy as np
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


@pytest.mark.parametrize(
    "flags",
    [
        (*USE, "k2@loss/is:prefix/behaviour:sampler/cap:5"),
        pytest.param((SPEC, "k1@reward"), marks=pytest.mark.full),
        pytest.param((*USE, "exact@loss"), marks=pytest.mark.full),
        (*USE, "exact@loss/top:8/is:token/behaviour:sampler"),
    ],
    ids=lambda flags: flags[-1],
)
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


def test_what_ranks_of_the_reference_give_is_joined_by_batch():
    from kl_plugins.adapters.openrlhf.top_k import of_batches

    # Two data-parallel groups with two batches each, two ranks in a ring, two of tensor parallelism.
    def rank(data, part):
        return [np.full((1 + part, 3), 100 * data + 10 * batch + part) for batch in range(2)]

    answers = [rank(data, part) for data in range(2) for part in range(2) for _ in range(2)]
    found = of_batches(answers, ring=2, tensor=2)
    assert [batch[:, 0].tolist() for batch in found] == [[0, 1, 1], [10, 11, 11], [100, 101, 101], [110, 111, 111]]
    assert [len(batch) for batch in of_batches(answers[:4:2], ring=1, tensor=1)] == [1, 1, 2, 2]
