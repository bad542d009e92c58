"""veRL's real program with its own vLLM rollout, on the CPU."""

import importlib.metadata
import re

import pytest

from tests.support.verl.main_ppo import run

pytestmark = [pytest.mark.full, pytest.mark.vllm, pytest.mark.timeout(1200)]

SETTINGS = {
    "actor_rollout_ref.rollout.name": "vllm",
    # The trainer computes in float32: in a first epoch only vLLM's own log-probs can make weights other than 1.
    "actor_rollout_ref.rollout.dtype": "bfloat16",
    "actor_rollout_ref.rollout.enforce_eager": True,
    "actor_rollout_ref.rollout.free_cache_engine": False,
    "+actor_rollout_ref.rollout.enable_sleep_mode": False,
    "actor_rollout_ref.rollout.load_format": "auto",
    "actor_rollout_ref.rollout.max_model_len": 64,
    "actor_rollout_ref.rollout.max_num_seqs": 8,
    "actor_rollout_ref.rollout.max_num_batched_tokens": 512,
    "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes": 16,
    "actor_rollout_ref.actor.use_kl_loss": True,
    "actor_rollout_ref.actor.kl_loss_coef": 0.1,
    "actor_rollout_ref.actor.kl_loss_type": "k2@loss/is:token/behaviour:sampler",
    "trainer.total_training_steps": 3,
}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    # Compilation takes longer than all the tokens sampled here.
    "VLLM_USE_AOT_COMPILE": "0",
    "TORCHDYNAMO_DISABLE": "1",
}


@pytest.fixture
def named_vllm(tmp_path):
    """A folder that tells veRL, which looks for the distribution vllm, of the one called vllm-cpu."""
    version = f"{importlib.metadata.version('vllm-cpu')}+cpu"  # from which vLLM infers its platform
    info = tmp_path / "named" / f"vllm-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return info.parent


def test_weights_divide_by_vllms_own_log_probs(assets, tmp_path, named_vllm):
    result = run(assets, tmp_path, SETTINGS, environment=ENVIRONMENT, folders=[named_vllm], seconds=1000)
    assert result.status == 0, result.error()
    assert re.search(
        r"k2@loss/is:token/behaviour:sampler active in veRL \S+, rank 0 of 1 .*behaviour sampler", result.output
    )
    assert len(result.steps) == 3
    for step in result.steps:
        assert step["kl/active"] == 1
        # Before the only update of a step the policy is the trainer's old one, which veRL itself compares with the
        # sampler.
        assert step["kl/trust_region"] == pytest.approx(step["rollout_corr/k3_kl"], rel=1e-3)
        assert step["kl/weight/max"] > 1.005
        assert 1e-5 < step["kl/trust_region"] < 0.01
    # The policy left the reference, and vLLM followed it: the weights of each update reach the sampler.
    assert result.steps[-1]["kl/value"] > 0.1
