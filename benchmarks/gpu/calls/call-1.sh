#!/usr/bin/env bash
# Call 1 installs the wheels, stores the first part of the model, and runs stage 1: tests and kernels.
# Its arguments are passed to `python -m benchmarks.gpu 1`, for example --smoke --device cpu.
. "$(dirname "$0")/common.sh"

"$python" "$here/needed.py"
rm -rf "$work/site" "$work/site.partial"
"$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
    --target "$work/site.partial" "$here"/wheels/*.whl
mv "$work/site.partial" "$work/site"
keep tree
if [ -d "$here/model/1" ]; then keep model/1; fi
stage 1 "$@"
