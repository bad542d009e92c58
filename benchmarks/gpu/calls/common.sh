# What the three calls share; each of them reads this file first.
#
# WORK    folder that lasts from call to call on the machine (default: /tmp/kl-plugins-gpu)
# OUT     folder that gets each call's results, packed (default: WORK)
# PYTHON  interpreter that has torch and the other packages named in README.txt (default: python3)
set -eu

here=$(cd "$(dirname "$0")" && pwd)
work=${WORK:-/tmp/kl-plugins-gpu}
python=${PYTHON:-python3}
mkdir -p "$work"
work=$(cd "$work" && pwd)
results=$(mkdir -p "${OUT:-$work}" && cd "${OUT:-$work}" && pwd)
# The copy of the repository comes first, and holds no kl_plugins/: the installed package is the one that is run.
export PYTHONPATH="$work/tree:$work/site${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# Copies a folder that was sent to where the next call finds it.
keep() {
    rm -rf "${work:?}/$1"
    mkdir -p "$work/$(dirname "$1")"
    cp -R "$here/$1" "$work/$1"
}

# Ends the call unless the first one has run on this machine.
need_first_call() {
    if [ ! -d "$work/site" ]; then
        echo "$work/site is not there: run call 1 first, on this machine and with this WORK" >&2
        exit 1
    fi
}

# Runs a stage with the call's own arguments and packs what it wrote, whether it ended well or not.
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
