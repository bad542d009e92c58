"""What is refused, with its reason: at the config, before a model loads or Ray starts."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import verl
from packaging.version import Version

from kl_plugins.adapters.verl import ADAPTER, refusals
from kl_plugins.adapters.verl.config import Specs, aggregation_of, behaviour_source, statement_of
from kl_plugins.adapters.versions import UnsupportedHostError
from kl_plugins.patches.verl.trainer import ATTRIBUTE, TrainerSession
from kl_plugins.spec import KLSpec, KLSpecError
from tests.support.verl.configs import composed as config
from tests.support.verl.ray_support import ASYNCHRONOUS, ENVIRONMENT, SINCE_0_9

LOSS = ("actor_rollout_ref.actor.use_kl_loss=True", "actor_rollout_ref.actor.kl_loss_type=k2@loss/is:token")
EXACT = (LOSS[0], "actor_rollout_ref.actor.kl_loss_type=exact@loss")
TOP = (LOSS[0], "actor_rollout_ref.actor.kl_loss_type=exact@loss/top")
LORA = "actor_rollout_ref.model.lora_rank=8"
SHARED = "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2"
SHARED_BY_ENGINE = "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=2"
ATTENTION = "+actor_rollout_ref.model.override_config.attn_implementation"
FUSED = "actor_rollout_ref.model.use_fused_kernels=True"
REWARD = ("algorithm.use_kl_in_reward=True", "algorithm.kl_penalty=k1@reward")
ADVANTAGE = ("algorithm.use_kl_in_reward=True", "algorithm.kl_penalty=k1@advantage", "algorithm.adv_estimator=grpo")
NO_LOG_PROBS = "actor_rollout_ref.rollout.calculate_log_probs=False"
V1 = pytest.mark.skipif(not SINCE_0_9, reason="veRL without v1 trainers")
MODES = pytest.mark.skipif(not ASYNCHRONOUS, reason="refused in this version")
MODE = "trainer.v1.trainer_mode"
FULLY = "+async_training.partial_rollout=True"  # its config has this group, and no other has it
LAUNCHER = pytest.mark.skipif(not SINCE_0_9, reason="veRL that checks its config in Ray's task runner")
ROLLOUT = "actor_rollout_ref.rollout"
LOGPROBS = f"{ROLLOUT}.logprobs_mode"
RAW_BY_ENGINE = f"+{ROLLOUT}.engine_kwargs.vllm.logprobs_mode=raw_logprobs"
SAMPLED = f"{ROLLOUT}.calculate_log_probs=True"
BYPASS = "algorithm.rollout_correction.bypass_mode=True"


def test_verls_defaults_hold_no_spec():
    assert not ADAPTER.specs_of(config())
    assert not ADAPTER.checked(config())


@pytest.mark.parametrize(
    "overrides",
    [
        LOSS,
        EXACT,
        TOP,
        (*TOP, LORA),
        REWARD,
        ADVANTAGE,
        (*LOSS, *REWARD),
        (*LOSS, SHARED),
        (*ADVANTAGE, SHARED_BY_ENGINE, f"{ATTENTION}=flash_attention_3"),
        (*LOSS, FUSED),
        (*REWARD, FUSED, SHARED),
        (*EXACT, SHARED),
        (*TOP, SHARED_BY_ENGINE),
        pytest.param((*LOSS, f"{MODE}=colocate_async"), marks=MODES),
        pytest.param((*ADVANTAGE, f"{MODE}=separate_async"), marks=MODES),
        (*ADVANTAGE, FULLY),
        (*LOSS, FULLY, "actor_rollout_ref.actor.kl_loss_type=k2@loss/beta:dual-0.1-0.01"),
    ],
)
def test_good_configs_pass(overrides):
    assert ADAPTER.checked(config(*overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("actor_rollout_ref.actor.kl_loss_type=k2@los",), "did you mean: loss"),
        (("algorithm.kl_penalty=k9@reward",), "k9"),
        (("actor_rollout_ref.actor.kl_loss_type=k1@reward",), r"put it into algorithm\.kl_penalty"),
        (("actor_rollout_ref.actor.kl_loss_type=frpo",), r"put it into algorithm\.kl_penalty"),
        (("algorithm.kl_penalty=k2@loss",), r"put it into actor_rollout_ref\.actor\.kl_loss_type"),
        (LOSS[1:], r"use_kl_loss is False"),
        (REWARD[1:], r"use_kl_in_reward is False"),
        ((*LOSS, "actor_rollout_ref.actor.kl_loss_coef=0"), "nothing would be regularised"),
        ((*LOSS, "actor_rollout_ref.actor.kl_loss_coef=-1"), "drives the policy away"),
        ((*REWARD, "algorithm.kl_ctrl.kl_coef=0"), "nothing would be regularised"),
        ((*REWARD, "algorithm.kl_penalty=k1@advantage/future:exact"), "use an exact @loss spec"),
        ((*EXACT, LORA), "under LoRA .* use exact@loss/top"),
        ((*TOP, "model_engine=megatron"), "strategy=megatron does not show the whole logits"),
        ((*EXACT, "++actor_rollout_ref.actor.fsdp_config.pad_to_length=True"), "pad_to_length"),
        ((*TOP, "++actor_rollout_ref.ref.fsdp_config.pad_to_length=True"), r"ref\.fsdp_config\.pad_to_length"),
        ((*TOP, FUSED), "a kernel that never holds the logits"),
        ((*EXACT, SHARED_BY_ENGINE), "the logits of other tokens of the reference than of the policy"),
        (
            (*LOSS, SHARED, f"{ATTENTION}=sdpa"),
            r"_ref\.actor\.ulysses.* under attn_implementation=sdpa each rank attends",
        ),
        ((*ADVANTAGE, SHARED_BY_ENGINE, f"{ATTENTION}=eager"), "under attn_implementation=eager each rank attends"),
        ((*REWARD, SHARED.replace(".actor.", ".ref."), f"{ATTENTION}=sdpa"), r"_ref\.ref\.ulysses.*each rank attends"),
        (
            (*LOSS, "actor_rollout_ref.actor.kl_loss_type=k2@loss/is:token/behaviour:sampler", NO_LOG_PROBS),
            "calculate_log_probs=True",
        ),
        ((*REWARD, BYPASS), "bypass_mode"),
        ((*ADVANTAGE, BYPASS), "bypass_mode"),
        (
            (REWARD[0], "algorithm.kl_penalty=k1@reward/beta:dual-0.1-0.01", "algorithm.kl_ctrl.type=adaptive"),
            "both control beta",
        ),
        (
            (*ADVANTAGE, FULLY, "algorithm.kl_penalty=k1@advantage/beta:dual-0.1-0.01"),
            "the state of beta:dual would be lost where a run is resumed",
        ),
        ((*REWARD, "algorithm.adv_estimator=gdpo"), r"adv_estimator=gdpo .* never reads rewards that hold a KL"),
        ((*REWARD, "algorithm.adv_estimator=grpo_passk"), r"adv_estimator=grpo_passk .* their KL is dropped"),
        ((*REWARD, "algorithm.adv_estimator=mine"), r"adv_estimator=mine .* is not veRL's own.* or a @loss spec"),
        ((*LOSS, SAMPLED, f"{LOGPROBS}=processed_logits"), "report logits, which are no log-probs"),
        ((*LOSS, SAMPLED, f"{ROLLOUT}.name=sglang", f"{ROLLOUT}.top_p=0.9"), "from before or after truncation"),
        (
            (*LOSS, SAMPLED, f"{ROLLOUT}.name=vllm", f"{ROLLOUT}.temperature=0.7", RAW_BY_ENGINE),
            r"raw log-probs.*\(temperature 0\.7\).*set actor_rollout_ref\.rollout\.engine_kwargs\.vllm\.logprobs_mode",
        ),
        ((*LOSS, SAMPLED, f"{ROLLOUT}.temperature=0.7", f"{LOGPROBS}=null"), "raw log-probs"),
        ((*ADVANTAGE, "algorithm.adv_estimator=opo"), "algorithm.adv_estimator=opo"),
        ((*ADVANTAGE, "algorithm.use_pf_ppo=True"), "resamples"),
        ((*ADVANTAGE, "actor_rollout_ref.actor.policy_loss.loss_mode=geo_mean"), "geo_mean"),
    ],
)
def test_contradictions_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        ADAPTER.checked(config(*overrides))


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (("model_engine=megatron",), "strategy=megatron"),
        ((FUSED, "actor_rollout_ref.model.fused_kernel_options.impl_backend=triton"), "impl_backend=triton"),
        (("actor_rollout_ref.actor.use_prefix_grouper=True",), "use_prefix_grouper"),
        pytest.param(("trainer.v1.trainer_mode=mine",), "trainer_mode=mine was not tested", marks=V1),
        (("distillation.enabled=True",), "distillation"),
    ],
)
def test_parts_that_were_not_tested_are_refused_by_name(overrides, part, monkeypatch):
    chosen = config(*LOSS, *overrides)
    with pytest.raises(UnsupportedHostError, match=part):
        ADAPTER.checked(chosen)
    monkeypatch.setenv("KL_PLUGINS_ALLOW_UNTESTED", "1")
    with pytest.warns(RuntimeWarning, match=part):
        assert ADAPTER.checked(chosen)
    assert not ADAPTER.checked(config(*overrides)), "without a spec nothing is refused"


def test_under_top_the_references_engine_was_tested_as_well():
    other = "actor_rollout_ref.ref.strategy=torchtitan"
    assert ADAPTER.checked(config(*EXACT, other))
    with pytest.raises(UnsupportedHostError, match=r"ref\.strategy=torchtitan, which has to show its logits"):
        ADAPTER.checked(config(*TOP, other))


@V1
@pytest.mark.parametrize("mode", ["colocate_async", "separate_async"])
def test_asynchronous_modes_of_versions_that_were_not_run_are_refused(mode, monkeypatch):
    monkeypatch.setattr(refusals, "FIRST_ASYNCHRONOUS", Version("99"))
    with pytest.raises(UnsupportedHostError, match=f"{mode} was not tested with veRL before 99"):
        ADAPTER.checked(config(*LOSS, f"{MODE}={mode}"))


@V1
def test_trainers_that_were_not_tested_are_refused_by_name():
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    class MyTrainer(PPOTrainerSync):
        pass

    refusals.check_trainer(PPOTrainerSync)
    with pytest.raises(UnsupportedHostError, match="MyTrainer"):
        refusals.check_trainer(MyTrainer)


@pytest.mark.parametrize(
    ("text", "overrides", "source"),
    [
        ("k2@loss", (), "unused"),
        ("k2@loss/is:token", ("actor_rollout_ref.rollout.calculate_log_probs=True",), "sampler"),
        ("k2@loss/is:token", (NO_LOG_PROBS,), "old"),
        ("k2@loss/is:token/behaviour:old", ("actor_rollout_ref.rollout.calculate_log_probs=True",), "old"),
        ("k2@loss/is:token/behaviour:old", (BYPASS,), "sampler"),
    ],
)
def test_behaviour_source(text, overrides, source):
    assert behaviour_source(KLSpec.parse(text), config(*overrides)) == source


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("token-mean", "token mean"),
        ("seq-mean-token-sum", "token sum"),
        ("seq-mean-token-sum-norm", "constant"),
        ("seq-mean-token-mean", "sequence mean"),
    ],
)
def test_aggregation_of_a_loss(mode, kind):
    actor = config(f"actor_rollout_ref.actor.loss_agg_mode={mode}").actor_rollout_ref.actor
    found = aggregation_of(actor, "loss")
    assert (found.kind, found.setting) == (kind, f"actor_rollout_ref.actor.loss_agg_mode={mode}")
    caveats = (*found.caveats, *statement_of(KLSpec.parse("k2@loss"), actor).caveats)
    assert len(caveats) == (kind in ("sequence mean", "constant"))
    assert ("loss_scale_factor" in str(caveats)) == (kind == "constant")


def test_a_penalty_is_aggregated_by_the_policy_loss():
    def kind(loss, placement):
        chosen = config(f"actor_rollout_ref.actor.policy_loss.loss_mode={loss}")
        return aggregation_of(chosen.actor_rollout_ref.actor, placement).kind

    assert [kind(loss, "reward") for loss in ("vanilla", "sapo", "geo_mean")] == ["token mean", *["sequence mean"] * 2]
    assert kind("sapo", "loss") == "token mean"
    old_gspo = Version(version("verl")) < Version("0.9.1")
    assert kind("gspo", "advantage") == ("sequence mean" if old_gspo else "token mean")


def sessions(*keys):
    """A batch of veRL's v1 trainers whose rows have these names."""
    from transfer_queue import KVBatchMeta

    return KVBatchMeta(keys=list(keys), tags=[{} for _ in keys], partition_id="train", fields=None, extra_info={})


@V1
def test_verl_takes_the_advantages_of_a_session_from_its_last_output():
    import numpy as np
    import torch
    from verl import DataProto
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

    rewards = torch.tensor([[-9.0], [1.0], [-9.0], [0.0]])
    data = DataProto.from_single_dict({"token_level_rewards": rewards, "response_mask": torch.ones(4, 1)})
    data.non_tensor_batch["uid"] = np.array(["a"] * 4, dtype=object)
    keys = ["a_0_0", "a_0_1", "a_1_0", "a_1_1"]
    found = compute_advantage_for_multi_trajectories(data, keys, "grpo", norm_adv_by_std_in_grpo=False)
    assert found.batch["advantages"].flatten().tolist() == [0.5, 0.5, -0.5, -0.5], "what kl-plugins refuses below"


@V1
@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("k1@reward", True),
        ("k1@advantage", True),
        ("k2@loss/horizon:sequence", True),
        ("k2@loss/is:prefix", True),
        ("k2@loss/is:token", False),
        ("k1@advantage/horizon:token", False),
    ],
)
def test_terms_of_whole_sessions_are_refused_where_an_agent_loop_gives_several_outputs(text, refused):
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    spec = KLSpec.parse(text)
    specs = Specs(spec, None) if spec.placement == "loss" else Specs(None, spec)
    trainer = object.__new__(PPOTrainerSync)  # it has no workers yet
    setattr(trainer, ATTRIBUTE, TrainerSession(specs))
    with pytest.raises(AttributeError):
        trainer._update_actor(sessions("a_0_0", "b_0_0", "b_1_0", "c_d_7_0"), metrics={})
    error, message = (
        (ValueError, r"several outputs in 2 sessions .*k2@loss/is:token") if refused else (AttributeError, "")
    )
    with pytest.raises(error, match=message):
        trainer._update_actor(sessions("a_0_0", "a_0_1", "a_0_2", "b_0_0", "b_1_1"), metrics={})


def test_a_spec_error_reaches_the_user_as_one():
    with pytest.raises(KLSpecError):
        ADAPTER.checked(config("actor_rollout_ref.actor.kl_loss_type=k2@loss/is:tokn"))


def main_ppo(*overrides, environment=None, folder=None):
    """The launching process of the real program, which must end before Ray starts."""
    variables = {**os.environ, **ENVIRONMENT, **(environment or {})}
    if folder:
        variables["PYTHONPATH"] = f"{folder}{os.pathsep}{variables['PYTHONPATH']}"
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *overrides]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=240, cwd=folder)


@LAUNCHER
def test_a_typo_ends_the_launching_process(tmp_path):
    result = main_ppo("actor_rollout_ref.actor.kl_loss_type=k2@loss/is:tokn", folder=tmp_path)
    assert result.returncode != 0
    assert "did you mean: token" in result.stderr
    assert "ray init kwargs" not in result.stdout


@LAUNCHER
def test_a_tampered_source_ends_the_launching_process(tmp_path):
    shutil.copytree(Path(verl.__file__).parent, tmp_path / "verl", ignore=shutil.ignore_patterns("__pycache__"))
    losses = tmp_path / "verl" / "workers" / "utils" / "losses.py"
    text = losses.read_text()
    assert "policy_loss += kl_loss * config.kl_loss_coef" in text
    losses.write_text(text.replace("policy_loss += kl_loss *", "policy_loss += 2 * kl_loss *"))
    result = main_ppo(*LOSS, folder=tmp_path)
    assert result.returncode != 0
    assert "verl.workers.utils.losses.ppo_loss of verl" in result.stderr
    assert "is not the code that kl-plugins was checked with" in result.stderr
    assert "ray init kwargs" not in result.stdout


@LAUNCHER
def test_an_unknown_version_ends_the_launching_process(tmp_path):
    info = tmp_path / "verl-0.99.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: verl\nVersion: 0.99.0\n")
    result = main_ppo(*LOSS, folder=tmp_path)
    assert result.returncode != 0
    assert "verl 0.99.0 is not among the versions that were checked (" in result.stderr
    assert "ray init kwargs" not in result.stdout
