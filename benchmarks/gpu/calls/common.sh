# Functions and settings of all three calls, which source this file first. These variables change the settings:
#
# WORK    folder on the machine that is kept between the calls (default: /tmp/kl-plugins-gpu)
# OUT     folder for the packed results of each call (default: WORK)
# PYTHON  interpreter that has torch and the other packages that README.txt names (default: python3)
set -eu

here=$(cd "$(dirname "$0")" && pwd)
work=${WORK:-/tmp/kl-plugins-gpu}
python=${PYTHON:-python3}
mkdir -p "$work"
work=$(cd "$work" && pwd)
results=$(mkdir -p "${OUT:-$work}" && cd "${OUT:-$work}" && pwd)
# The copy of the repository comes first. It has no kl_plugins/, so that Python imports the installed package.
export PYTHONPATH="$work/tree:$work/site${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
deepspeed=$work/site-deepspeed
export KL_PLUGINS_DEEPSPEED="$deepspeed"

# Installs the wheels of a folder that was sent into a folder on the machine, which is complete if it exists.
unpack() {
    rm -rf "$2" "$2.partial"
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
        --target "$2.partial" "$here/$1"/*.whl
    mv "$2.partial" "$2"
}

# Copies a folder that was sent to the place where the next call finds it.
keep() {
    rm -rf "${work:?}/$1"
    mkdir -p "$work/$(dirname "$1")"
    cp -R "$here/$1" "$work/$1"
}

# Stops the call unless call 1 has run on this machine.
need_first_call() {
    if [ ! -d "$work/site" ]; then
        echo "$work/site is not there: run call 1 first, on this machine and with this WORK" >&2
        exit 1
    fi
}

# Runs a stage with the arguments of the call and packs its results, also if the stage failed.
stage() {
    number=$1
    shift
    cd "$work/tree"
    status=0
    "$python" -m benchmarks.gpu "$number" "$@" || status=$?
    tar -czf "$results/stage-$number.tgz" -C out/bench gpu
    echo "stage $number: status $status, results in $results/stage-$number.tgz"
    exit "$status"
}
