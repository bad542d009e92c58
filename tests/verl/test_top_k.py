"""``top:`` on real workers: the reference's own pass, in another process, gives what the policy's update needs."""

import pytest

from tests.support.verl.reference import distance
from tests.support.verl.roles import Role, by_formula, scored
from tests.support.verl.workers import BETA, make_batch

K = 4


@pytest.fixture(scope="module")
def reference(models, cluster):
    made = Role("ref", models[2])
    yield made
    made.end()


@pytest.fixture(scope="module")
def batch(models, reference):
    drawn = make_batch(models[0])
    del drawn.log_probs["rollout_log_probs"]
    return scored(drawn, reference.workers, K)


@pytest.mark.parametrize("correction", ["none", "token", "prefix", "sequence"])
def test_the_term_is_set_and_bucket_and_a_weighted_sample(correction, single, batch, models):
    models[0].zero_grad()
    (BETA * by_formula(models, batch, K, correction)).backward()
    gradient = {name: parameter.grad.clone() for name, parameter in models[0].named_parameters()}
    assert distance(single.run(f"exact@loss/top:{K}/is:{correction}", batch).gradient, gradient) < 1e-4
