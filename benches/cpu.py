"""Tokens per second on a CPU, beside llama.cpp's with the same file and threads.

    python3 benches/cpu.py MODEL.gguf --llama-bench PATH/llama-bench

Runs `llama-bench` and `flashinfer bench` (of target/release) in turn, once each in every round,
and prints the best of all rounds: what else runs on a machine only takes time away. Memory is
the most that a process had resident. docs/benchmarks/cpu.md says how to build llama-bench.
"""

import argparse
import json
import os
import subprocess
import sys


def measure(command, threads):
    """What a command prints, and the most bytes that it had resident."""
    environment = os.environ | {"RAYON_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"{' '.join(command)}: status {status}")
    return output, usage.ru_maxrss * 1024


def llama(arguments, test):
    kind, tokens = test[:2], test[2:]
    counts = ["-p", tokens, "-n", "0"] if kind == "pp" else ["-p", "0", "-n", tokens]
    command = [arguments.llama_bench, "-m", arguments.model, "-t", str(arguments.threads)]
    output, memory = measure([*command, *counts, "-r", "1", "-o", "json"], arguments.threads)
    return json.loads(output)[0]["avg_ts"], memory


def flashinfer(arguments, test):
    kind, tokens = test[:2], test[2:]
    only = ["-p", tokens, "-n", "1"] if kind == "pp" else ["-p", "1", "-n", tokens]
    command = [arguments.flashinfer, "bench", arguments.model, "--device", "cpu", "-r", "1"]
    output, memory = measure([*command, *only], arguments.threads)
    rows = [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("| ")]
    return next(float(row[1]) for row in rows if row[0] == test), memory


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--llama-bench", required=True)
    parser.add_argument("--flashinfer", default="target/release/flashinfer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    tests, programs = ["pp512", "tg128"], {"flashinfer": flashinfer, "llama.cpp": llama}
    best = {(test, name): (0.0, 0) for test in tests for name in programs}
    for _ in range(arguments.rounds):
        for test in tests:
            for name, program in programs.items():
                rate, memory = program(arguments, test)
                old_rate, old_memory = best[test, name]
                best[test, name] = (max(rate, old_rate), max(memory, old_memory))

    size = os.path.getsize(arguments.model)
    print(f"{os.path.basename(arguments.model)}, {size / 1e6:.0f} MB; {arguments.threads} threads, "
          f"best of {arguments.rounds} rounds")
    print("| test | flashinfer, tokens/s | llama.cpp, tokens/s | ratio "
          "| flashinfer, MB resident | llama.cpp, MB resident |")
    print("|---|---|---|---|---|---|")
    for test in tests:
        (ours, our_memory), (theirs, their_memory) = (best[test, name] for name in programs)
        print(f"| {test} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} "
              f"| {our_memory / 1e6:.0f} | {their_memory / 1e6:.0f} |")


if __name__ == "__main__":
    main()
