#!/usr/bin/env bash
# NVIDIA's compute-sanitizer over a GPU test's program, each test in a process of its own.
# tests/sanitizers/compute.sh TOOL PROGRAM [FILTER ...], as in
# tests/sanitizers/compute.sh memcheck norm_gpu rmsnorm
# TOOL is memcheck, racecheck or initcheck. Needs CUDA 13's compute-sanitizer and a GPU. Warps are much slower
# under it: a test has TIME seconds (200), and LANES of them run at a time (one for each core). With LAUNCHES, only
# as many of each test's launches are looked at. Calls that fail are not reported, as tests ask for such.
set -euo pipefail
cd "$(dirname "$0")/../.."
tool=$1
program=$2
shift 2
command -v compute-sanitizer >/dev/null || {
    echo "there is no compute-sanitizer in PATH; CUDA 13 has it in its bin folder" >&2
    exit 1
}
export FLASHINFER_RS_RUN_GPU_TESTS=1
binary=$(cargo test --release --features doctor,candle --test "$program" --no-run --message-format=json-render-diagnostics |
    python3 -c 'import json, sys; print(*(line["executable"] for line in map(json.loads, sys.stdin)
        if line.get("executable") and line["target"]["name"] == sys.argv[1]))' "$program")
logs=$(mktemp -d)

# Says what came of a test, and keeps its log unless nothing was found.
check() {
    local log="$logs/${1//::/.}.txt" status=0 reports
    # The shell says of what is killed that it was.
    {
        timeout -s KILL "${TIME:-200}" compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 \
            --launch-count "${LAUNCHES:-0}" --report-api-errors no "$binary" --test-threads 1 --exact "$1" </dev/null >"$log" 2>&1 || status=$?
    } 2>/dev/null
    if [ "$status" = 0 ]; then
        rm "$log"
        echo "$1: nothing found"
    elif grep -aq 'before first instrumented API call' "$log" && grep -aq 'test result: ok' "$log"; then
        rm "$log"
        echo "$1: launches nothing"
    elif [ "$status" = 137 ]; then
        reports=$(grep -acE 'Race reported|Uninitialized|Invalid' "$log")
        echo "$1: cut off after ${TIME:-200} s, with $reports reports ($log)"
        [ "$reports" = 0 ]
    else
        echo "$1: status $status: $(grep -aE 'SUMMARY|panicked' "$log" | head -n 1) ($log)"
        false
    fi
}
export -f check
export tool binary logs
tests=$("$binary" --list --format terse "$@" | sed -n 's/: test$//p')
[ -n "$tests" ] || {
    echo "$program has no test that is called so: $*" >&2
    exit 1
}
xargs -P "${LANES:-$(nproc)}" -I{} bash -c 'check "$1"' _ {} <<<"$tests"
