"""Digests of the OpenRLHF functions that are wrapped, by the first version that has them."""

from __future__ import annotations

FINGERPRINTS: dict[str, dict[str, str]] = {
    "openrlhf.models.utils:compute_approx_kl": {
        "0.10.2": "fa5a46903e960781",
        "0.11.1": "275acb39a00fcad6",
        "0.11.2": "1922d391db93f612",
    },
    "openrlhf.utils.config:hierarchize": {"0.10.2": "d8455388ba92a660"},
    "openrlhf.utils.deepspeed.deepspeed:DeepspeedStrategy.optimizer_step": {"0.10.2": "5c3f15ba1f88db96"},
    "openrlhf.utils.agent:SingleTurnAgentExecutor.execute": {"0.10.2": "505f22ab411b11bc"},
    "openrlhf.trainer.ray.vllm_engine:create_vllm_engines": {"0.10.2": "48d27e5bf07ba909"},
    "openrlhf.trainer.ray.ppo_actor:ActorPPOTrainer.training_step": {
        "0.10.2": "2a6046cd16f687c2",
        "0.10.3": "871cf8a2559cfd24",
        "0.10.4": "78d0190cde03d01a",
        "0.11.1": "190d23cacfdf28db",
        "0.11.2": "56e218e03a1a7d3b",
    },
    "openrlhf.trainer.ray.ppo_actor:ActorPPOTrainer.ppo_train": {
        "0.10.2": "283a21dd527a3e08",
        "0.10.4": "50db3116331bc2ec",
    },
    "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker.__init__": {"0.10.2": "c869fabeb632576f"},
    "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker.make_experience": {"0.10.2": "bc7282f28b51c1ea"},
    "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker.compute_advantages_and_returns": {
        "0.10.2": "1822f2e3e8f805e1",
        "0.11.2": "7c803c798b10a88b",
    },
    "openrlhf.trainer.ppo_utils.samples_generator:SamplesGenerator._dispatch_prompts_to_vllm": {
        "0.10.2": "828ae24862cf25ad",
        "0.11.2": "88c281167a65376b",
    },
    "openrlhf.trainer.ppo_utils.samples_generator:SamplesGenerator._process_response_into_experience": {
        "0.10.2": "658d03e3bbfba228"
    },
    "openrlhf.trainer.ppo_trainer:BasePPOTrainer.__init__": {"0.10.2": "dc707ee5d25c212e"},
    "openrlhf.trainer.ppo_trainer:BasePPOTrainer.init_checkpoint_states": {"0.10.2": "a5852d1b31bfd960"},
    "openrlhf.trainer.ppo_trainer:BasePPOTrainer.train_step": {"0.10.2": "a0528fb4df8883cb"},
    "openrlhf.trainer.ppo_trainer:BasePPOTrainer.ppo_train": {"0.10.2": "462c6ef3bd4a1f0e"},
    "openrlhf.trainer.ppo_trainer:BasePPOTrainer.save_logs_and_checkpoints": {
        "0.10.2": "fbbd247750fe81f9",
        "0.11.2": "721ce308ee53bf1b",
    },
    "openrlhf.trainer.ppo_trainer:BasePPOTrainer.save_best_checkpoint": {
        "0.10.2": "69153535d3d122f8",
        "0.11.2": "1143c548e84daada",
    },
}
