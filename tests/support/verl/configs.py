"""veRL's own config, composed by Hydra from veRL's files."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import verl
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf


@cache
def composed(*overrides: str) -> Any:
    """The config of veRL's PPO programs with some settings changed; shared, so not to be changed itself.

    Args:
        *overrides: as on the command line.
    """
    folder = str(Path(verl.__file__).parent / "trainer" / "config")
    with initialize_config_dir(folder, version_base=None):
        return compose("ppo_trainer", overrides=list(overrides))


def with_settings(settings: dict[str, Any]) -> Any:
    """The config of veRL's program with settings that its own validation asks for, and with others.

    Args:
        settings: the others, by key with dots.
    """
    config = copy.deepcopy(composed())
    fixed = {
        "trainer.n_gpus_per_node": 1,
        "data.train_batch_size": 256,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 4,
        "actor_rollout_ref.rollout.name": "vllm",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 4,
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": 4,
        "algorithm.adv_estimator": "grpo",
    }
    for key, value in {**fixed, **settings}.items():
        OmegaConf.update(config, key, value)
    return config
