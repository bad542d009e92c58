"""Which functions of OpenRLHF are wrapped, and by what."""

from __future__ import annotations

from functools import partial

from kl_plugins.adapters.openrlhf import HOST
from kl_plugins.patches.engine.patch import PatchSet, checked_patch
from kl_plugins.patches.openrlhf import (
    ACTOR,
    AGENT,
    ARGUMENTS,
    ENGINE,
    HOOKS,
    MAKER,
    SAMPLES,
    STRATEGY,
    TRAINER,
    launcher,
    trainer,
    worker,
)

ESTIMATORS = "openrlhf.models.utils"
"""Home of the KL function. The hooks are on the names by which other modules have imported it."""

_patch = partial(checked_patch, HOOKS.sources.checked)

PATCHES = PatchSet(
    HOST,
    (
        _patch(ARGUMENTS, "hierarchize", launcher.hierarchize),
        _patch(ENGINE, "create_vllm_engines", launcher.create_vllm_engines),
        _patch(SAMPLES, "SamplingParams", launcher.sampling_params),  # vLLM's class; only the name is OpenRLHF's
        _patch(SAMPLES, "SamplesGenerator._dispatch_prompts_to_vllm", launcher.dispatch_prompts),
        _patch(SAMPLES, "SamplesGenerator._process_response_into_experience", launcher.process_response),
        _patch(AGENT, "SingleTurnAgentExecutor.execute", launcher.execute),
        _patch(STRATEGY, "DeepspeedStrategy.optimizer_step", worker.optimizer_step),
        _patch(ESTIMATORS, "compute_approx_kl", worker.approx_kl, used_in=ACTOR),
        _patch(ACTOR, "ActorPPOTrainer.training_step", worker.training_step),
        _patch(ACTOR, "ActorPPOTrainer.ppo_train", worker.ppo_train),
        _patch(ESTIMATORS, "compute_approx_kl", worker.approx_kl, used_in=MAKER),
        _patch(MAKER, "RemoteExperienceMaker.__init__", trainer.init_maker),
        _patch(MAKER, "RemoteExperienceMaker.make_experience", trainer.make_experience),
        _patch(MAKER, "RemoteExperienceMaker.compute_advantages_and_returns", trainer.compute_advantages),
        _patch(TRAINER, "BasePPOTrainer.__init__", trainer.init),
        _patch(TRAINER, "BasePPOTrainer.init_checkpoint_states", trainer.init_checkpoint_states),
        _patch(TRAINER, "BasePPOTrainer.train_step", trainer.train_step),
        _patch(TRAINER, "BasePPOTrainer.ppo_train", trainer.ppo_train),
        _patch(TRAINER, "BasePPOTrainer.save_logs_and_checkpoints", trainer.save_logs_and_checkpoints),
        _patch(TRAINER, "BasePPOTrainer.save_best_checkpoint", trainer.save_best_checkpoint),
    ),
    check_on_use=True,
)
