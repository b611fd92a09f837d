#!/usr/bin/env bash
# Everything that needs a GPU, in one command: scripts/gpu_check.sh OUT
#
# Uses the python3 on PATH (torch >= 2.11 with CUDA, Triton >= 3.6, Python >= 3.10) and no network; installs nothing.
# Steps: build the extension in place, environment, the op's tests on the device with the Triton backend (through pytest
# where it is installed, and always through scripts/run_device_checks.py), the rows benchmark. Each step has its own time
# limit and the next one runs whatever became of it. Logs and JSON go to OUT; status 1 if a step failed.
set -uo pipefail
if [ $# -ne 1 ]; then
    echo "usage: scripts/gpu_check.sh OUT" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1
export MAX_JOBS="${MAX_JOBS:-$(nproc)}"
summary="$out/summary.txt"
: >"$summary"
status=0

# step NAME SECONDS COMMAND...: run with a time limit, output to OUT/NAME.log
step() {
    local name=$1 limit=$2 started=$SECONDS code=0
    shift 2
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
    local verdict=ok
    if [ "$code" -ne 0 ]; then
        verdict="FAILED (status $code)"
        [ "$code" -eq 124 ] && verdict="FAILED (over $limit s)"
        status=1
    fi
    echo "$name: $verdict after $((SECONDS - started)) s" | tee -a "$summary"
    [ "$code" -eq 0 ] || tail -n 15 "$out/$name.log"
}

# The limits add up to less than 9 minutes.
step build 90 env LT_KERNELS_BUILD="${LT_KERNELS_BUILD:-cpu}" python3 setup.py --quiet build_ext --inplace
step info 15 python3 -m lt_kernels info --json
if python3 -c 'import pytest, hypothesis' 2>/dev/null; then
    workers=$(python3 -c 'import xdist; print("-n 8")' 2>/dev/null)
    # shellcheck disable=SC2086  # two words or none
    step tests 105 env LT_KERNELS_TEST_BACKENDS=triton LT_KERNELS_TEST_DEVICE=cuda \
        python3 -m pytest -q -p no:cacheprovider $workers \
        tests/ops/test_margin_cross_entropy.py tests/ops/test_bad_input.py
else
    echo "tests: not run (pytest or hypothesis is not installed)" | tee -a "$summary"
fi
step checks 140 python3 scripts/run_device_checks.py --device cuda --backend triton --seconds 130 \
    --json "$out/checks.json"
step bench 150 python3 -m lt_kernels bench margin_cross_entropy --device cuda --seconds 0.5 --dtype bfloat16,float32 \
    --case inat18-n8192,c65536-n4096,c100k-n4096,inat18-n512,aligned-n512 --json "$out/margin_cross_entropy.json"
echo "all steps: status $status after $SECONDS s" | tee -a "$summary"
exit "$status"
