#!/usr/bin/env bash
# The run of one_node.sh as a job on a Ray cluster. Every node needs the same environment: OpenRLHF, and kl-plugins
# beside it. The hooks reach each of the job's workers by a setup hook that `kl-plugins run` adds to the job.
#
#   on the first node:    ray start --head --dashboard-host=0.0.0.0
#   on every other node:  ray start --address=FIRST_NODE:6379
#   anywhere:             ADDRESS=http://FIRST_NODE:8265 NODES=2 bash ray_job.sh
#
# Where the cluster asks for Ray's token, set RAY_AUTH_MODE=token here, and have the token in ~/.ray/auth_token.
#
# This folder travels to the nodes with the job, so that each has the reward function. Model, data and output are read
# and written by all nodes: name the hub, or a folder that all of them share.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

ADDRESS=${ADDRESS:-http://127.0.0.1:8265}
NODES=${NODES:-2}
GPUS=${GPUS:-8} # per node
RUNTIME_ENV=${RUNTIME_ENV:-'{"excludes": ["data", "out"]}'} # for example {"env_vars": {"HF_HOME": "/shared/hf"}}
export MODEL=${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}
export DATA=${DATA:?a file that all nodes share, such as .../openrlhf/train.jsonl}
export OUT=${OUT:?a folder that all nodes share}
export REWARD=reward.py # relative: in the copy of this folder that Ray gives to each node

# The job runs on the cluster, with none of the variables of this shell: those of one_node.sh are handed over.
handed=("SLEEP=${SLEEP---vllm.enable_sleep --ds.enable_sleep}")
for name in MODEL DATA OUT REWARD KL BETA GPUS SAMPLES PROMPTS RESPONSES PROMPT LENGTH MICRO; do
  if [[ -n ${!name:-} ]]; then handed+=("$name=${!name}"); fi
done
exec ray job submit --address "$ADDRESS" --working-dir "$HERE" --runtime-env-json "$RUNTIME_ENV" -- \
  env "${handed[@]}" bash one_node.sh \
  --actor.num_nodes "$NODES" --ref.num_nodes "$NODES" --vllm.num_engines $((NODES * GPUS)) "$@"
