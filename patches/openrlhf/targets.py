"""Which functions of OpenRLHF are wrapped, and by what."""

from __future__ import annotations

from packaging.specifiers import SpecifierSet

from kl_plugins.adapters.openrlhf.host import SUPPORTED
from kl_plugins.patches.openrlhf import cli, experience, rollout, trainer, worker
from kl_plugins.patches.openrlhf.fingerprints import FINGERPRINTS
from kl_plugins.patches.patch import Patch, PatchSet, Wrapper

ESTIMATORS = "openrlhf.models.utils"
ARGUMENTS = "openrlhf.utils.config"
AGENT = "openrlhf.utils.agent"
STRATEGY = "openrlhf.utils.deepspeed.deepspeed"
ENGINE = "openrlhf.trainer.ray.vllm_engine"
ACTOR = "openrlhf.trainer.ray.ppo_actor"
MAKER = "openrlhf.trainer.ppo_utils.experience_maker"
SAMPLES = "openrlhf.trainer.ppo_utils.samples_generator"
TRAINER = "openrlhf.trainer.ppo_trainer"


def _patch(home: str, qualname: str, wrapper: Wrapper, used_in: str = "") -> Patch:
    """A hook on a function at its home, or on the name by which another module has imported it."""
    return Patch(used_in or home, qualname, wrapper, FINGERPRINTS.get(f"{home}:{qualname}", {}))


PATCHES = PatchSet(
    "openrlhf",
    SpecifierSet(SUPPORTED),
    (
        _patch(ARGUMENTS, "hierarchize", cli.hierarchize),
        _patch(ENGINE, "create_vllm_engines", cli.create_vllm_engines),
        _patch(SAMPLES, "SamplingParams", rollout.sampling_params),  # vLLM's class; only the name is OpenRLHF's
        _patch(SAMPLES, "SamplesGenerator._dispatch_prompts_to_vllm", rollout.dispatch_prompts),
        _patch(SAMPLES, "SamplesGenerator._process_response_into_experience", rollout.process_response),
        _patch(AGENT, "SingleTurnAgentExecutor.execute", rollout.execute),
        _patch(STRATEGY, "DeepspeedStrategy.optimizer_step", worker.optimizer_step),
        _patch(ESTIMATORS, "compute_approx_kl", worker.approx_kl, used_in=ACTOR),
        _patch(ACTOR, "ActorPPOTrainer.training_step", worker.training_step),
        _patch(ACTOR, "ActorPPOTrainer.ppo_train", worker.ppo_train),
        _patch(ESTIMATORS, "compute_approx_kl", experience.approx_kl, used_in=MAKER),
        _patch(MAKER, "RemoteExperienceMaker.__init__", experience.init),
        _patch(MAKER, "RemoteExperienceMaker.make_experience", experience.make_experience),
        _patch(MAKER, "RemoteExperienceMaker.compute_advantages_and_returns", experience.compute_advantages),
        _patch(TRAINER, "BasePPOTrainer.__init__", trainer.init),
        _patch(TRAINER, "BasePPOTrainer.init_checkpoint_states", trainer.init_checkpoint_states),
        _patch(TRAINER, "BasePPOTrainer.train_step", trainer.train_step),
        _patch(TRAINER, "BasePPOTrainer.ppo_train", trainer.ppo_train),
        _patch(TRAINER, "BasePPOTrainer.save_logs_and_checkpoints", trainer.save_logs_and_checkpoints),
        _patch(TRAINER, "BasePPOTrainer.save_best_checkpoint", trainer.save_best_checkpoint),
    ),
    check_on_use=True,
)
