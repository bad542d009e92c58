"""``python -m benchmarks.study --host openrlhf``: short runs through OpenRLHF's own update."""

import logging
import math

import pytest

from benchmarks.drivers.openrlhf import know_float32
from benchmarks.study import hosts, models, openrlhf_host
from benchmarks.study.measure import LOGGED
from benchmarks.study.settings import Cell, Settings

# Enough pre-training for rewards, without which an arm that has no KL would have no gradient.
QUICK = Settings(steps=3, evaluate_every=3, pretrain_steps=150, prompts=4, generations=8, learning_rate=2e-2)
WITHOUT = {"kl/ess", "kl/weight/max", "kl/weight/mean", "kl/floor_frac", "kl/coef/std"}  # of a run without a spec


@pytest.fixture(scope="module")
def train(harness, tmp_path_factory):
    """Trains an arm from one briefly trained reference, in the actors of the session's other tests."""
    folder = tmp_path_factory.mktemp("reference")
    models.make_reference(folder, "sums", "llama", QUICK, lambda steps: None)
    know_float32(harness)

    def run(arm, delay=0, precision="fp32", settings=QUICK):
        ticks = []
        cell = Cell("sums", "llama", arm, delay, precision, "openrlhf")
        result = openrlhf_host.run(cell, 1, settings, folder, ticks.append, lambda: harness)
        assert ticks == [1, 2, 3]
        return result

    return run


@pytest.fixture(scope="module")
def none(train):
    return train("none")


def checked(result):
    """First and last point of a curve that is what a run in TRL would give."""
    assert result.keys() == {"curve", "seconds", "cpu_seconds", "evaluation_seconds"}
    first, last = result["curve"]
    assert (first["step"], last["step"]) == (0, 3)
    assert first.keys() == last.keys() == {"step", "reward", "kl", "entropy", "coverage", *LOGGED}
    assert all(math.isfinite(value) for value in last.values() if value is not None)
    assert first["kl"] == pytest.approx(0.0, abs=1e-9)
    assert last["kl"] > 1e-3  # the weights that came back from the actor are others
    return first, last


def test_the_study_knows_the_host():
    assert hosts.find_host("openrlhf") is openrlhf_host.run


def test_without_kl_openrlhf_trains_alone(none):
    _, last = checked(none)
    assert {key for key in LOGGED if last[key] is None} == WITHOUT
    assert last["grad_norm"] > 0


@pytest.mark.parametrize(("arm", "delay"), [("k2@loss/is:token", 1), ("k1@advantage", 0)])
def test_a_spec_trains_and_is_active(arm, delay, train, none, caplog):
    with caplog.at_level(logging.INFO, "kl_plugins"):
        _, last = checked(train(arm, delay))
    assert f"kl-plugins: {arm} active in OpenRLHF" in caplog.text
    assert ("behaviour sampler" in caplog.text) == ("is:" in arm)
    assert all(last[key] is not None for key in LOGGED)
    assert last["kl/coef/std"] > 1e-3
    assert last["kl"] != none["curve"][-1]["kl"]
    # The weight divides by the sampler's probabilities: other than 1 where it lags, and 1 to rounding where not.
    assert (last["kl/weight/max"] > 1.05) == bool(delay)
    assert (last["kl/weight/max"] == pytest.approx(1.0, abs=1e-4)) == (not delay)


def test_a_run_repeats_itself(train, none):
    assert train("none")["curve"] == none["curve"]


@pytest.mark.parametrize(
    ("arm", "settings", "said"),
    [
        ("exact@advantage", QUICK, r"exact terms need the logits, .*use an exact @loss spec"),
        ("native-k3", QUICK, "native-k3 is TRL's own KL"),
        ("k2@loss", Settings(device="cuda"), r"on the CPU alone, not on cuda; use --device cpu"),
    ],
)
def test_refusals_say_why(arm, settings, said, train):
    with pytest.raises(ValueError, match=said):
        train(arm, settings=settings)
