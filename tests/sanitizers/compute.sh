#!/usr/bin/env bash
# NVIDIA's compute-sanitizer over a GPU test's program.
# tests/sanitizers/compute.sh TOOL PROGRAM [FILTER ...], as in
# tests/sanitizers/compute.sh memcheck rmsnorm_gpu
# TOOL is memcheck, racecheck or initcheck. Needs CUDA 13's compute-sanitizer and a GPU. Warps are much
# slower under it: choose filters that leave few tests, or give TIME, in seconds.
set -euo pipefail
cd "$(dirname "$0")/../.."
tool=$1
program=$2
shift 2
export FLASHINFER_RS_RUN_GPU_TESTS=1
binary=$(cargo test --release --features doctor,candle --test "$program" --no-run --message-format=json-render-diagnostics |
    python3 -c 'import json, sys; print([line["executable"] for line in map(json.loads, sys.stdin) if line.get("executable")][-1])')
timeout "${TIME:-200}" compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 \
    "$binary" --test-threads 1 "$@"
