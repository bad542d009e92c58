#!/usr/bin/env bash
# Call 3 runs stage 3: the model on stale data. If it is run again, it makes the missing runs.
# Its arguments are passed to `python -m benchmarks.gpu 3`, for example --smoke --device cpu.
. "$(dirname "$0")/common.sh"

need_first_call
stage 3 "$@"
