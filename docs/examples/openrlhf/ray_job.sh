#!/usr/bin/env bash
# This script makes the run of one_node.sh as a job on a Ray cluster. Every node needs the same environment with
# OpenRLHF and kl-plugins. `kl-plugins run` adds a setup hook to the job, which puts the hooks into each worker.
#
#   on the first node:    ray start --head --dashboard-host=0.0.0.0
#   on every other node:  ray start --address=FIRST_NODE:6379
#   anywhere:             ADDRESS=http://FIRST_NODE:8265 NODES=2 bash ray_job.sh
#
# If the cluster requires Ray's token, set RAY_AUTH_MODE=token here, and put the token into ~/.ray/auth_token.
#
# Ray copies this folder to the nodes, so that each of them has the reward function. All nodes read and write model,
# data and output, so these must be on the hub or in a folder that all nodes share.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

ADDRESS=${ADDRESS:-http://127.0.0.1:8265}
NODES=${NODES:-2}
GPUS=${GPUS:-8} # per node
RUNTIME_ENV=${RUNTIME_ENV:-'{"excludes": ["data", "out"]}'} # for example {"env_vars": {"HF_HOME": "/shared/hf"}}
export MODEL=${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}
export DATA=${DATA:?a file that all nodes share, such as .../openrlhf/train.jsonl}
export OUT=${OUT:?a folder that all nodes share}
export REWARD=reward.py # relative to the copy of this folder on each node

# The job does not get the variables of this shell, so the variables of one_node.sh are passed to it.
handed=("SLEEP=${SLEEP---vllm.enable_sleep --ds.enable_sleep}")
for name in MODEL DATA OUT REWARD KL BETA GPUS SAMPLES PROMPTS RESPONSES PROMPT LENGTH MICRO; do
  if [[ -n ${!name:-} ]]; then handed+=("$name=${!name}"); fi
done
exec ray job submit --address "$ADDRESS" --working-dir "$HERE" --runtime-env-json "$RUNTIME_ENV" -- \
  env "${handed[@]}" bash one_node.sh \
  --actor.num_nodes "$NODES" --ref.num_nodes "$NODES" --vllm.num_engines $((NODES * GPUS)) "$@"
