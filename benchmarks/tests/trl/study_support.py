"""What the study's tests share: settings of short runs, and which TRL they need."""

import pytest
import trl
from packaging.version import Version

from benchmarks.study.settings import Settings
from kl_plugins.adapters.trl.config import ROLLOUT_WITHOUT_VLLM

QUICK = Settings(steps=5, evaluate_every=5, pretrain_steps=30, prompts=4, generations=4, learning_rate=2e-2)

needs_rollouts = pytest.mark.skipif(
    Version(trl.__version__) < ROLLOUT_WITHOUT_VLLM, reason="this TRL calls rollout_func only with vLLM"
)
