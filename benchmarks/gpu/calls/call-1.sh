#!/usr/bin/env bash
# Call 1 installs the wheels, stores the first part of the model, and runs stage 1: tests and kernels.
# Its arguments are passed to `python -m benchmarks.gpu 1`, for example --smoke --device cpu.
. "$(dirname "$0")/common.sh"

"$python" "$here/needed.py"
# DeepSpeed gets its own folder, because transformers imports it in every process that can find it.
if [ -d "$here/wheels-deepspeed" ]; then unpack wheels-deepspeed "$deepspeed"; fi
unpack wheels "$work/site"
keep tree
if [ -d "$here/model/1" ]; then keep model/1; fi
stage 1 "$@"
