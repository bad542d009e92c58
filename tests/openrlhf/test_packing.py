"""Packed and dynamic batches: the same regulariser, and one controller step per optimizer step.

The fixture ``packing`` says what of OpenRLHF's packing is not its own here.
"""

import pytest

from tests.support.openrlhf import by_hand
from tests.support.openrlhf.command_line import DYNAMIC, ONE_STEP, PACKED, SPEC

USE = ("--algo.kl.use_loss", SPEC)

pytestmark = pytest.mark.full


def test_packing_changes_neither_gradient_nor_metrics(packing, rollouts):
    flags = (*USE, "k2@loss/is:prefix/behaviour:sampler/cap:5", *ONE_STEP)
    plain, packed = (packing.run((*flags, *more), rollouts) for more in ((), PACKED))
    assert plain.gradient.keys() == packed.gradient.keys()
    for name, gradient in plain.gradient.items():
        error = (gradient - packed.gradient[name]).norm() / gradient.norm().clamp_min(1e-6)
        assert error < 0.05, name  # bfloat16, added up in another order
    for key in ("kl/value", "kl/coef/mean", "kl/weight/max", "kl/ess"):
        assert packed.metrics[0][key] == pytest.approx(plain.metrics[0][key], rel=0.02, abs=0.01), key


def test_dynamic_batches_step_the_controller_once_per_optimizer_step(packing, rollouts):
    result = packing.run((*USE, "k2@loss/beta:linear-1-0-4", *DYNAMIC), rollouts)
    (state,) = packing.ask(by_hand.controller)
    assert (state["step"], state["beta"]) == (4, 0)
    assert 0.25 < result.metrics[0]["kl/beta"] < 1
    assert result.metrics[0]["kl/active"] == 1


def test_openrlhfs_controller_reads_the_mean_of_dynamic_batches(packing, rollouts):
    # OpenRLHF's own number is that divided by the number of micro-batches.
    flags = (*USE, "k3@loss", *ONE_STEP, *DYNAMIC)
    (metrics,) = packing.run(flags, rollouts).metrics
    assert metrics["kl"] == pytest.approx(metrics["kl/value"], rel=1e-4)
    target = metrics["kl"] * 1.1
    result = packing.run((*flags, "--algo.kl.target", str(target), "--algo.kl.horizon", "80"), rollouts)
    # Only just below its target: an error of a half or less would be clipped to -0.2.
    assert result.trainer.kl_ctl.value == pytest.approx(0.5 * (1 + (1 / 1.1 - 1) * 8 / 80), rel=1e-5)


@pytest.mark.parametrize("text", ["k1@advantage", "k1@reward"])
def test_scores_reach_dynamic_batches(packing, rollouts, text):
    result = packing.run((SPEC, text, "--algo.advantage.estimator", "group_norm", *DYNAMIC), rollouts)
    assert result.metrics[0]["kl/active"] == 1
    assert result.metrics[0]["kl/log_ratio/mean"] > 0.1
