"""veRL's real asynchronous trainers, from the command line to the last metric: what is old, what is new, and its KL."""

import itertools
import re
from dataclasses import dataclass
from statistics import mean

import pytest
import torch

from tests.support.verl.main_ppo import KL_TYPE, LOSS, Finished, run
from tests.support.verl.ray_support import ASYNCHRONOUS
from tests.support.verl.updates import Updates

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not ASYNCHRONOUS, reason="refused in this version"),
]

BETA, FLOOR = 0.1, 0.5
SPEC = "k2@loss/is:token/floor:0.5"

REWARD = '''
"""Share of characters with an odd code."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **unused):
    return sum(ord(character) % 2 for character in solution_str) / max(len(solution_str), 1)
'''

TRANSPORT = {
    "actor_rollout_ref.rollout.checkpoint_engine.backend": "mailbox",
    "actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module": "verl_on_cpu.transport",
    "+ray_kwargs.ray_init.num_gpus": 2,  # one for the trainer, one for the engine
}
EXPERIMENTAL = {
    **TRANSPORT,
    "hydra.searchpath": "[pkg://verl.trainer.config]",  # one of the two programs looks for it in the working folder
    "actor_rollout_ref.hybrid_engine": False,
    "rollout.nnodes": 1,
    "rollout.n_gpus_per_node": 1,
    "actor_rollout_ref.rollout.n_gpus_per_node": None,
    "ray_kwargs.ray_init.num_cpus": 64,  # counted, not used: veRL asks for ten for each part of it
}


@dataclass(frozen=True)
class Mode:
    """One of the trainers.

    Attributes:
        settings: that choose it.
        every: number of updates between two times that weights are sent to the engine.
        old: which policy the old log-probs are of by default: ``present``, ``sampler``, or ``sent``, the weights that
            were sent last.
        recomputed: the same without bypass mode.
        program: of veRL.
        logged: number of updates in each line of metrics.
    """

    settings: dict[str, object]
    old: str
    recomputed: str
    every: int = 1
    program: str = "verl.trainer.main_ppo"
    logged: tuple[int, ...] = (1, 1, 1, 1)


MODES = {
    "colocate_async": Mode(
        {"trainer.v1.trainer_mode": "colocate_async", "trainer.v1.colocate_async.num_warmup_batches": 2},
        "present",
        "present",
    ),
    "separate_async": Mode(
        {
            **TRANSPORT,
            "trainer.v1.trainer_mode": "separate_async",
            "trainer.v1.separate_async.parameter_sync_step": 2,
            "data.train_batch_size": 8,
            "actor_rollout_ref.rollout.nnodes": 1,
        },
        "sent",
        "sent",
        every=2,
        logged=(2, 2, 2, 2),
    ),
    "one_step_off_policy": Mode(
        EXPERIMENTAL, "sampler", "present", program="verl.experimental.one_step_off_policy.main_ppo"
    ),
    "fully_async_policy": Mode(
        {
            **EXPERIMENTAL,
            "data.train_batch_size": 0,
            "data.gen_batch_size": 1,
            "async_training.trigger_parameter_sync_step": 2,
            "async_training.staleness_threshold": 1,
            "rollout.n": 2,
            "rollout.total_rollout_steps": 32,
            "actor_rollout_ref.model.use_remove_padding": False,
            "trainer.total_training_steps": None,
            "trainer.test_freq": 1000,
        },
        "sampler",
        "sent",
        every=2,
        program="verl.experimental.fully_async_policy.fully_async_main",
        logged=(1, 2, 2, 2, 1),  # veRL logs a cycle before it adds the last update of it
    ),
}


def trained(mode: Mode, assets, work, settings: dict[str, object]) -> tuple[Finished, Updates]:
    """Run a mode, and give what it printed and logged, and its updates."""
    record = work / "updates"
    record.mkdir()
    (work / "reward.py").write_text(REWARD)
    general = {
        "trainer.total_training_steps": 4,
        "actor_rollout_ref.actor.optim.lr": 2e-4,
        "reward.custom_reward_function.path": work / "reward.py",
    }
    environment = {"RECORD_UPDATES": str(record), "SAMPLER_SECONDS": "0.5"}
    merged = {**general, **mode.settings, **settings}
    result = run(assets, work, merged, environment=environment, program=mode.program)
    assert result.status == 0, result.error()
    return result, Updates(record, assets / "model")


def lines_of(result: Finished, mode: Mode) -> list[tuple[dict[str, float], range]]:
    """The logged metrics, each with the updates that it is about.

    The fully asynchronous trainer also logs other things.
    """
    logged = [step for step in result.steps if "training/global_step" in step]
    ends = list(itertools.accumulate(mode.logged))
    return [(line, range(end - count, end)) for line, end, count in zip(logged, ends, mode.logged, strict=True)]


def is_of(policy: str, updates: Updates, index: int, mode: Mode) -> bool:
    """Whether the old log-probs of an update are those of a policy."""
    update = updates.all[index]
    old = update.flat("old_log_probs")
    if policy == "sampler":
        return torch.equal(old, update.flat("rollout_log_probs"))
    of = index if policy == "present" else index // mode.every * mode.every
    return bool((old - updates.under(of, update)).abs().max() < 2e-4)


@pytest.mark.parametrize("name", MODES)
def test_a_weighted_loss(name, assets, tmp_path):
    mode = MODES[name]
    result, updates = trained(mode, assets, tmp_path, {**LOSS, KL_TYPE: SPEC})
    assert re.search(rf"{SPEC} active in veRL \S+, rank 0 of 1 .*behaviour sampler", result.output)
    lines = lines_of(result, mode)
    assert len(updates.all) == sum(mode.logged)
    parts_of_two = False
    for logged, indices in lines:
        weights, floored, youngest, oldest = [], [], [], []
        for index in indices:
            update, cycle = updates.all[index], index // mode.every
            drawn = updates.generated_by(index, mode.every)
            parts_of_two |= any(row[0][1] < row[-1][0] for row in drawn)
            present, sampler = updates.under(index, update), update.flat("rollout_log_probs")
            assert is_of(mode.old, updates, index, mode)
            assert (update.flat("ref_log_prob") - updates.under(0, update)).abs().max() < 2e-4
            assert updates.gradient_error(index, BETA, FLOOR) < 1e-5
            weight = (present - sampler).exp()
            weights.append(float(weight.mean()))
            floored.append(float((weight < FLOOR).double().mean()))
            youngest.append(mean([cycle - row[0][1] for row in drawn]))
            oldest.append(mean([cycle - row[0][0] for row in drawn]))
        assert logged["kl/weight/mean"] == pytest.approx(mean(weights), abs=1e-3)
        assert logged["kl/floor_frac"] == pytest.approx(mean(floored), abs=1e-3)
        assert mean(youngest) <= logged["kl/age/mean"] <= mean(oldest)
        assert logged["kl/active"] == 1
        assert logged["kl/beta"] == BETA
    last, _ = lines[-1]
    assert last["kl/age/max"] >= 1
    assert last["kl/value"] > 0
    # The one-step-off trainer waits for whole batches.
    assert parts_of_two == (name != "one_step_off_policy")


@pytest.mark.parametrize("name", MODES)
def test_a_penalty_in_the_advantages(name, assets, tmp_path):
    mode = MODES[name]
    settings = {
        "algorithm.use_kl_in_reward": True,
        "algorithm.kl_penalty": "k1@advantage",
        "algorithm.kl_ctrl.kl_coef": BETA,
        "algorithm.rollout_correction.bypass_mode": False,
    }
    result, updates = trained(mode, assets, tmp_path, settings)
    assert len(re.findall("k1@advantage active in veRL", result.output)) == 1
    k1 = []
    for index, update in enumerate(updates.all):
        assert is_of(mode.recomputed, updates, index, mode)
        for row in update.rows:
            own = row["old_log_probs"] - row["ref_log_prob"]
            # GRPO's advantages are the same for all tokens of a response.
            assert torch.allclose(row["advantages"].diff(), BETA * own[:-1], atol=1e-5)
        k1.append(float((update.flat("old_log_probs") - update.flat("ref_log_prob")).mean()))
    assert max(k1) > 1e-3
    for logged, indices in lines_of(result, mode):
        assert logged["kl/reverse_k1"] == pytest.approx(mean(k1[index] for index in indices), abs=1e-4)
        assert logged["kl/beta"] == BETA
        assert "kl/age/mean" in logged


@pytest.mark.parametrize("name", ["separate_async", "fully_async_policy"])
def test_the_references_most_probable_tokens(name, assets, tmp_path):
    mode, k = MODES[name], 4
    result, updates = trained(mode, assets, tmp_path, {**LOSS, KL_TYPE: f"exact@loss/top:{k}"})
    exact = [updates.bucketed(index, k) for index in range(len(updates.all))]
    assert max(exact) > 1e-4
    for logged, indices in lines_of(result, mode):
        assert logged["kl/exact"] == pytest.approx(mean(exact[index] for index in indices), rel=1e-3)
