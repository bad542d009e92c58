"""Where kl-plugins goes into OpenRLHF: hooks that are put in as it imports its modules, checked when a spec is used."""

from __future__ import annotations

from kl_plugins.patches.on_import import ImportHooks

HOOKS = ImportHooks(
    host="OpenRLHF",
    table="kl_plugins.patches.openrlhf.targets",
    modules=(
        "openrlhf.utils.config",
        "openrlhf.utils.agent",
        "openrlhf.utils.deepspeed.deepspeed",
        "openrlhf.trainer.ray.vllm_engine",
        "openrlhf.trainer.ray.ppo_actor",
        "openrlhf.trainer.ppo_utils.experience_maker",
        "openrlhf.trainer.ppo_utils.samples_generator",
        "openrlhf.trainer.ppo_trainer",
    ),
)
"""The table in ``targets`` names no other modules."""

attach, detach = HOOKS.attach, HOOKS.detach
