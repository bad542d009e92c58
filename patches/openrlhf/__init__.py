"""Where kl-plugins goes into OpenRLHF: hooks that are put in as it imports its modules, checked when a spec is used."""

from __future__ import annotations

from pathlib import Path

from kl_plugins.adapters.openrlhf import HOST
from kl_plugins.patches.engine.on_import import ImportHooks

ARGUMENTS = "openrlhf.utils.config"
AGENT = "openrlhf.utils.agent"
STRATEGY = "openrlhf.utils.deepspeed.deepspeed"
ENGINE = "openrlhf.trainer.ray.vllm_engine"
ACTOR = "openrlhf.trainer.ray.ppo_actor"
MAKER = "openrlhf.trainer.ppo_utils.experience_maker"
SAMPLES = "openrlhf.trainer.ppo_utils.samples_generator"
TRAINER = "openrlhf.trainer.ppo_trainer"

HOOKS = ImportHooks(HOST, Path(__file__).parent, (ARGUMENTS, AGENT, STRATEGY, ENGINE, ACTOR, MAKER, SAMPLES, TRAINER))
