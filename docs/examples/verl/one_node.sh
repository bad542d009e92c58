#!/usr/bin/env bash
# GRPO in veRL under a KL spec, on one node. veRL finds kl-plugins by itself if it is installed in veRL's environment.
#
#   python ../data.py                                          # writes ./data
#   bash one_node.sh
#   KL=k2@loss/is:token GPUS=4 bash one_node.sh trainer.save_freq=20    # add more Hydra overrides at the end
#
# Before the first rollout each worker prints one line, and a worker without it stops the run:
#
#   kl-plugins: k2@loss/is:token/floor:0.5 active in veRL ..., rank 0 of 8 (...), ..., behaviour sampler, ...
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

MODEL=${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}
DATA=${DATA:-$HERE/data/verl}     # train.parquet and test.parquet
REWARD=${REWARD:-$HERE/reward.py} # has the function compute_score
OUT=${OUT:-$HERE/out}             # checkpoints
KL=${KL:-k2@loss/is:token/floor:0.5}
BETA=${BETA:-0.001}               # coefficient of the KL; must not be 0
ENGINE=${ENGINE:-vllm}            # or sglang
GPUS=${GPUS:-8}                   # per node
STEPS=${STEPS:-200}
PROMPTS=${PROMPTS:-128}           # per step
RESPONSES=${RESPONSES:-8}         # per prompt
LENGTH=${LENGTH:-512}             # largest number of tokens of a response
MICRO=${MICRO:-8}                 # responses per GPU and forward pass; divides PROMPTS * RESPONSES / 2 / number of GPUs

overrides=(
  # The KL term beside the policy loss: its switch, the spec, and the coefficient. These are veRL's own keys.
  actor_rollout_ref.actor.use_kl_loss=True
  actor_rollout_ref.actor.kl_loss_type="$KL"
  actor_rollout_ref.actor.kl_loss_coef="$BETA"
  # A spec with @reward or @advantage belongs to other keys: leave out the three lines above, and set
  #   algorithm.use_kl_in_reward=True algorithm.kl_penalty=k1@advantage algorithm.kl_ctrl.kl_coef=0.001

  # With this line the importance weight divides by the sampler's log-probs, so that it also corrects for numerical
  # differences of the engine's kernels. Without it, the weight divides by the trainer's own old log-probs.
  actor_rollout_ref.rollout.calculate_log_probs=True

  algorithm.adv_estimator=grpo
  data.train_files="$DATA/train.parquet"
  data.val_files="$DATA/test.parquet"
  data.train_batch_size="$PROMPTS"
  data.max_prompt_length=256
  data.max_response_length="$LENGTH"
  reward.custom_reward_function.path="$REWARD"
  reward.custom_reward_function.name=compute_score

  actor_rollout_ref.model.path="$MODEL"
  actor_rollout_ref.actor.optim.lr=1e-6
  # The batch of an update is half of a rollout batch, so there are two updates per rollout; the second is off-policy.
  actor_rollout_ref.actor.ppo_mini_batch_size=$((PROMPTS / 2))
  actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu="$MICRO"
  actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu="$MICRO"
  actor_rollout_ref.rollout.name="$ENGINE"
  actor_rollout_ref.rollout.n="$RESPONSES"
  actor_rollout_ref.rollout.tensor_model_parallel_size=1
  actor_rollout_ref.rollout.gpu_memory_utilization=0.6
  actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu="$MICRO"

  trainer.nnodes=1
  trainer.n_gpus_per_node="$GPUS"
  trainer.total_training_steps="$STEPS"
  trainer.val_before_train=False
  trainer.test_freq=-1
  trainer.save_freq=100
  trainer.default_local_dir="$OUT/checkpoints"
  'trainer.logger=["console"]' # ["console","wandb"]: the metrics kl/... appear there too
)
exec python3 -m verl.trainer.main_ppo "${overrides[@]}" "$@"
