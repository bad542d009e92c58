#!/usr/bin/env bash
# This script makes the run of one_node.sh on a Ray cluster. Every node needs the same environment with veRL and
# kl-plugins.
#
#   on the first node:    ray start --head --dashboard-host=0.0.0.0
#   on every other node:  ray start --address=FIRST_NODE:6379
#   anywhere:             ADDRESS=http://FIRST_NODE:8265 NODES=2 bash ray_cluster.sh
#
# If the cluster requires Ray's token, set RAY_AUTH_MODE=token here, and put the token into ~/.ray/auth_token.
#
# Ray copies this folder to the nodes, so that each of them has the reward function. All nodes read and write model,
# data and output, so these must be on the hub or in a folder that all nodes share.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

ADDRESS=${ADDRESS:-http://127.0.0.1:8265}
NODES=${NODES:-2}
RUNTIME_ENV=${RUNTIME_ENV:-'{"excludes": ["data", "out"]}'} # for example {"env_vars": {"HF_HOME": "/shared/hf"}}
export MODEL=${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}
export DATA=${DATA:?a folder that all nodes share, with train.parquet and test.parquet}
export OUT=${OUT:?a folder that all nodes share}
export REWARD=reward.py # relative to the copy of this folder on each node

# The job does not get the variables of this shell, so the variables of one_node.sh are passed to it.
handed=()
for name in MODEL DATA OUT REWARD KL BETA ENGINE GPUS STEPS PROMPTS RESPONSES LENGTH MICRO; do
  if [[ -n ${!name:-} ]]; then handed+=("$name=${!name}"); fi
done
exec ray job submit --address "$ADDRESS" --working-dir "$HERE" --runtime-env-json "$RUNTIME_ENV" -- \
  env "${handed[@]}" bash one_node.sh trainer.nnodes="$NODES" "$@"
