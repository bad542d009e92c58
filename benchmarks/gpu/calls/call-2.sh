#!/usr/bin/env bash
# Call 2 stores the second part of the model, joins and converts the model, and runs stage 2: a real model in TRL.
# Its arguments are passed to `python -m benchmarks.gpu 2`, for example --smoke --device cpu.
. "$(dirname "$0")/common.sh"

need_first_call
if [ -d "$here/model/2" ]; then
    keep model/2
    cd "$work/tree"
    "$python" -m benchmarks.llm.parts join "$work/model" "$work/joined"
    "$python" -m benchmarks.llm.model --source "$work/joined"
fi
stage 2 "$@"
