#!/usr/bin/env bash
# Call 3 runs stage 3: the model on stale data. Run again, it goes on with the runs that are missing.
# Arguments go to `python -m benchmarks.gpu 3`, for example --smoke --device cpu.
. "$(dirname "$0")/common.sh"

need_first_call
stage 3 "$@"
