"""The spec that is named for each of the hosts' own settings is the one whose gradient was measured to be the same."""

from __future__ import annotations

import pytest

from tests.pages.migration import settings
from tests.support.configs import explained

VERL_LOSS = "actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_type={}"
VERL_REWARD = "algorithm.use_kl_in_reward=True algorithm.kl_penalty={}"


def words(host: str, setting: str) -> str:
    """The words of a config with a setting of ``benchmarks.hosts``."""
    if host == "trl":
        bias = "use_bias_correction_kl" in setting
        level = "sequence" if "sequence level" in setting else "token"
        return f"beta=0.25 use_bias_correction_kl={bias} importance_sampling_level={level}"
    name, *flags = setting.replace(" in reward", "").split(", ")
    if host == "verl":
        return (VERL_REWARD if "in reward" in setting else VERL_LOSS).format(name)
    return " ".join([f"--algo.kl.estimator {name}", *(f"--algo.kl.{flag}" for flag in flags)])


CASES = [(host, setting) for host in ("trl", "verl", "openrlhf") for setting in settings(host)]


@pytest.mark.parametrize(("host", "setting"), CASES, ids=lambda value: str(value))
def test_the_named_spec_is_the_measured_one(host: str, setting: str) -> None:
    measured = settings(host)[setting]["near"]
    told = explained(host, words(host, setting))
    said = told.statements["as a spec"].replace("/cap:10", "")  # no weight of the measurement reached the cap
    same = "Its gradient is that of" if measured["equal"] else "Its gradient is that of no spec; the nearest is"
    assert said == f"{same} {measured['nearest']}."


@pytest.mark.parametrize(("host", "setting"), CASES, ids=lambda value: str(value))
def test_clamps_are_named_where_tokens_without_gradient_were_measured(host: str, setting: str) -> None:
    dead = settings(host)[setting]["far"]["dead_tokens"]
    said = explained(host, words(host, setting)).statements
    if dead and "loss" in said["KL"]:
        assert "no gradient" in said["clamps"]
    if "clamps" not in said:
        assert not dead
