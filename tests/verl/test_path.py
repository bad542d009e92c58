"""How many functions of ours a spec passes in veRL, from the flag to the gradient."""

from typing import Any

import ray

from tests.contract import path
from tests.support.verl.configs import composed
from tests.support.verl.workers import Group, make_batch

SETTINGS = (
    "trainer.n_gpus_per_node=1",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4",
    "algorithm.adv_estimator=grpo",
    "actor_rollout_ref.actor.use_kl_loss=True",
)


def test_the_path_of_a_spec_is_short(single: Group, model: Any) -> None:
    from verl.utils.config import validate_config

    ray.cloudpickle.register_pickle_by_value(path)
    spec = "k2@loss/is:token/cap:7"  # a process parses a text once, so no other test may have used this one
    config = composed(*SETTINGS, f"actor_rollout_ref.actor.kl_loss_type={spec}")
    path.start()
    try:
        validate_config(config, use_reference_policy=True, use_critic=False)
    finally:
        launching = path.stop()
    single.ask(path.start)
    single.use(spec)
    single.by_rank(make_batch(model).tensordict())
    functions = path.listed(launching, *single.ask(path.stop))
    print(f"\n{len(functions)} functions:", *functions, sep="\n  ")
    assert functions[-1] == "term:kl_term"
    assert len(functions) <= path.LIMIT
    assert functions == path.in_guide("veRL"), "the guide lists other functions"
