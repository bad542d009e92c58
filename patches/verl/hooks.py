"""Which functions of veRL are wrapped, and by what."""

from __future__ import annotations

from functools import partial

from kl_plugins.adapters.verl import HOST
from kl_plugins.patches.engine.patch import PatchSet, checked_patch
from kl_plugins.patches.verl import HOOKS, reference, trainer, worker

ALGORITHMS = "verl.trainer.ppo.core_algos"
LOSSES = "verl.workers.utils.losses"
WORKERS = "verl.workers.engine_workers"
TRAINER = "verl.trainer.ppo.ray_trainer"
TRAINER_V1 = "verl.trainer.ppo.v1.trainer_base"
V1_UTILS = "verl.trainer.ppo.v1.utils"
SEPARATE = "verl.experimental.separation.ray_trainer"

_patch = partial(checked_patch, HOOKS.sources.checked)

PATCHES = PatchSet(
    HOST,
    (
        _patch(ALGORITHMS, "kl_penalty", worker.kl_penalty),
        _patch(ALGORITHMS, "kl_penalty", worker.kl_penalty, used_in=LOSSES),
        _patch(LOSSES, "ppo_loss", worker.ppo_loss),
        _patch(LOSSES, "ppo_loss", worker.ppo_loss, used_in=WORKERS),
        _patch(WORKERS, "TrainingWorker.train_batch", worker.train_batch),
        _patch(WORKERS, "TrainingWorker.infer_batch", reference.infer_batch),
        _patch(WORKERS, "TrainingWorker.save_checkpoint", worker.save_checkpoint),
        _patch(WORKERS, "TrainingWorker.load_checkpoint", worker.load_checkpoint),
        _patch(TRAINER, "apply_kl_penalty", trainer.apply_kl_penalty),
        _patch(TRAINER, "apply_kl_penalty", trainer.apply_kl_penalty, used_in=TRAINER_V1),
        _patch(TRAINER, "compute_advantage", trainer.compute_advantage),
        _patch(TRAINER, "compute_advantage", trainer.compute_advantage, used_in=V1_UTILS),
        _patch(V1_UTILS, "compute_advantage_for_multi_trajectories", trainer.compute_advantage),
        _patch(V1_UTILS, "compute_advantage_for_multi_trajectories", trainer.compute_advantage, used_in=TRAINER_V1),
        _patch(TRAINER, "RayPPOTrainer.__init__", trainer.init),
        _patch(TRAINER, "RayPPOTrainer.init_workers", trainer.init_workers),
        _patch(TRAINER, "RayPPOTrainer._compute_ref_log_prob", reference.compute_ref_log_prob),
        _patch(TRAINER, "RayPPOTrainer._update_actor", trainer.update_actor),
        _patch(TRAINER, "RayPPOTrainer._save_checkpoint", trainer.save_checkpoint),
        _patch(TRAINER, "RayPPOTrainer._load_checkpoint", trainer.load_checkpoint),
        _patch(TRAINER, "apply_kl_penalty", trainer.apply_kl_penalty, used_in=SEPARATE),
        _patch(TRAINER, "compute_advantage", trainer.compute_advantage, used_in=SEPARATE),
        _patch(SEPARATE, "SeparateRayPPOTrainer._init_worker_groups", trainer.init_worker_groups),
        _patch(TRAINER_V1, "PPOTrainer.__init__", trainer.init),
        _patch(TRAINER_V1, "PPOTrainer.init", trainer.init_workers),
        _patch(TRAINER_V1, "PPOTrainer._compute_ref_log_prob", reference.compute_ref_log_prob),
        _patch(TRAINER_V1, "PPOTrainer._update_actor", trainer.update_actor),
        _patch(TRAINER_V1, "PPOTrainer._save_checkpoint", trainer.save_checkpoint),
        _patch(TRAINER_V1, "PPOTrainer._load_checkpoint", trainer.load_checkpoint),
    ),
    check_on_use=True,
)
