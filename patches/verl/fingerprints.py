"""Digests of the veRL functions that are wrapped, by the first version that has them."""

from __future__ import annotations

from packaging.version import Version


def expected(version: str) -> dict[str, dict[str, str]]:
    """The table below without the functions that a version does not have yet.

    Args:
        version: of veRL.
    """
    return {
        name: digests
        for name, digests in FINGERPRINTS.items()
        if min(map(Version, digests)).release <= Version(version).release
    }


FINGERPRINTS: dict[str, dict[str, str]] = {
    "verl.trainer.ppo.core_algos:kl_penalty": {"0.8.0": "dd5c6deb8796eaa9"},
    "verl.workers.utils.losses:ppo_loss": {"0.8.0": "67fa6179cc2c49b7"},
    "verl.workers.engine_workers:TrainingWorker.train_batch": {"0.8.0": "b0b20d44917843f5"},
    "verl.workers.engine_workers:TrainingWorker.save_checkpoint": {"0.8.0": "c143112a3d270105"},
    "verl.workers.engine_workers:TrainingWorker.load_checkpoint": {"0.8.0": "6ca5e0d611058fda"},
    "verl.trainer.ppo.ray_trainer:apply_kl_penalty": {"0.8.0": "d7b0974f4d32ca3a"},
    "verl.trainer.ppo.ray_trainer:compute_advantage": {"0.8.0": "ef8567bdd8b7925e"},
    "verl.trainer.ppo.ray_trainer:RayPPOTrainer.__init__": {"0.8.0": "65a8f9fdb1a249c9"},
    "verl.trainer.ppo.ray_trainer:RayPPOTrainer.init_workers": {
        "0.8.0": "c02d6c0f678a99b2",
        "0.9.0": "0f9a82f22f03bd51",
    },
    "verl.trainer.ppo.ray_trainer:RayPPOTrainer._update_actor": {
        "0.8.0": "fc0000c2786a5f4e",
        "0.9.0": "33380c62280ce713",
    },
    "verl.trainer.ppo.ray_trainer:RayPPOTrainer._save_checkpoint": {"0.8.0": "b74ccff28feabc70"},
    "verl.trainer.ppo.ray_trainer:RayPPOTrainer._load_checkpoint": {"0.8.0": "1692e53d361fc865"},
    "verl.trainer.ppo.v1.utils:compute_advantage_for_multi_trajectories": {"0.9.0": "1b9cf2175e4fda93"},
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer.__init__": {"0.9.0": "cd73c6dd03e4cbaa", "0.9.1": "adfce748a87eada6"},
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer.init": {"0.9.0": "7942bdf925837fc5"},
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._update_actor": {"0.9.0": "2174f25eb556683a"},
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._save_checkpoint": {
        "0.9.0": "01a34063dae74b85",
        "0.9.1": "f17c9dafb6e00468",
    },
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._load_checkpoint": {
        "0.9.0": "2870aabc370bc52d",
        "0.9.1": "e6cca3f551fc8cd0",
    },
}
