#!/bin/sh
# Measures decode steps and prompts on a GPU, and writes what docs/benchmarks/steps.md says:
# benches/steps.sh [flashinfer] >docs/benchmarks/steps.md
set -eu
flashinfer=${1:-target/release/flashinfer}
echo "# Steps and prompts of the engine"
echo
echo "What \`benches/steps.sh\` measures, one after the other. Weights are random, so that no file is needed; contexts have"
echo "128 tokens. What is asked of these figures, and where they fall short, is in [serve.md](../serve.md#time)."
measure() {
    echo
    echo "## \`flashinfer bench $*\`"
    echo
    "$flashinfer" bench "$@"
}
measure --shape smollm2-135m --steps 1,8,64,256 --kernels
measure --shape llama-8b --steps 1,8,64,256 --kernels
measure --shape llama-8b --steps 1,8,64 --kernels --weights e4m3
measure --shape llama-8b --prompts 8192,32768
