#!/bin/sh
# Measures decode steps on one GPU and on two of a machine, of which docs/benchmarks/parallel.md has a table:
# benches/parallel.sh [flashinfer]
set -eu
flashinfer=${1:-target/release/flashinfer}
measure() {
    for gpus in 1 2; do
        parallel=
        [ "$gpus" = 1 ] || parallel="--tensor-parallel $gpus"
        echo "## \`flashinfer bench $*${parallel:+ $parallel}\`"
        echo
        # Two words, or none.
        # shellcheck disable=SC2086
        "$flashinfer" bench "$@" $parallel
        echo
    done
}
for context in 128 1024 4096; do
    measure --shape llama-8b --steps 1,8,64 --context "$context"
done
measure --shape llama-8b --steps 64 --context 8192
measure --shape llama-8b --steps 1,8,64 --weights e4m3
measure smollm2 --steps 1,8,64
# Its random weights take minutes to make.
measure --shape llama-70b --steps 1,8,64 --weights e4m3
