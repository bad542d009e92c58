#!/usr/bin/env bash
# GRPO in OpenRLHF under a KL spec, on one node. `kl-plugins run` starts OpenRLHF's own program.
#
#   python ../data.py                                          # writes ./data
#   bash one_node.sh
#   KL=k2@loss/is:token GPUS=4 bash one_node.sh --ckpt.save_steps 20    # add more flags of OpenRLHF at the end
#
# Before the first update each policy worker prints one line, and a worker without it stops the run:
#
#   kl-plugins: k2@loss/is:token/floor:0.5 active in OpenRLHF ..., rank 0 of 8 (...), ...
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

MODEL=${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}
DATA=${DATA:-$HERE/data/openrlhf/train.jsonl}
REWARD=${REWARD:-$HERE/reward.py} # has the function reward_func
OUT=${OUT:-$HERE/out}             # checkpoints and the trained model
KL=${KL:-k2@loss/is:token/floor:0.5}
BETA=${BETA:-0.001}               # coefficient of the KL; must not be 0
GPUS=${GPUS:-8}                   # actor, reference and vLLM share them
SAMPLES=${SAMPLES:-2048}          # total number of prompts
PROMPTS=${PROMPTS:-128}           # per rollout batch
RESPONSES=${RESPONSES:-8}         # per prompt
PROMPT=${PROMPT:-256}             # largest number of tokens of a prompt
LENGTH=${LENGTH:-512}             # largest number of tokens of a response
MICRO=${MICRO:-8}                 # responses per GPU and forward pass
SLEEP=${SLEEP---vllm.enable_sleep --ds.enable_sleep} # idle parts free their memory; empty: they never do

flags=(
  # The KL term beside the policy loss: its switch, the spec, and the coefficient. These are OpenRLHF's own flags.
  --algo.kl.use_loss
  --algo.kl.estimator "$KL"
  --algo.kl.init_coef "$BETA"
  # For a spec with @reward or @advantage (k1@advantage), leave out --algo.kl.use_loss.

  # The commented flag turns on OpenRLHF's importance sampling. The policy loss and the weight in the spec then divide
  # by vLLM's log-probs. Without the flag, both divide by the trainer's recomputed log-probs. To use vLLM's log-probs
  # for the KL only, leave the flag out and append /behaviour:sampler to the spec.
  # --algo.advantage.is_correction_level token

  --algo.advantage.estimator group_norm # GRPO
  --data.prompt_dataset "$DATA"
  --data.input_key input
  --data.label_key label
  --data.apply_chat_template
  --data.max_samples "$SAMPLES"
  --data.max_len $((PROMPT + LENGTH))
  --reward.remote_url "$REWARD"

  --actor.model_name_or_path "$MODEL"
  --actor.adam.lr 1e-6
  --actor.num_gpus_per_node "$GPUS"
  --ref.num_gpus_per_node "$GPUS"
  --vllm.num_engines "$GPUS"
  --vllm.gpu_memory_utilization 0.6
  --train.colocate_all
  --rollout.batch_size "$PROMPTS"
  --rollout.n_samples_per_prompt "$RESPONSES"
  --rollout.max_new_tokens "$LENGTH"
  --rollout.micro_batch_size "$MICRO"
  # The batch of an update is half of a rollout batch, so there are two updates per rollout; the second is off-policy.
  --train.batch_size $((PROMPTS * RESPONSES / 2))
  --train.micro_batch_size "$MICRO"
  --ckpt.path "$OUT/checkpoints"
  --ckpt.output_dir "$OUT/model"
)
# shellcheck disable=SC2086  # SLEEP has several words
exec kl-plugins run openrlhf.cli.train_ppo_ray "${flags[@]}" $SLEEP "$@"
