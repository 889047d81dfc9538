"""What is asked of the engine's steps, and what they take: one run, on one GPU, beside PyTorch and llama.cpp.

    python3 benches/targets.py --flashinfer target/release/flashinfer --model SmolLM2-135M-Instruct.Q4_1.gguf \\
        --llama-server PATH >docs/benchmarks/targets.md

The model is `smollm2` of the program; Llama 8B's weights are random. Needs PyTorch and transformers beside Python's
standard library (`hf_transformers.py`), and llama.cpp's server. What could not be measured is said, in its place.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import bench_steps
from report import table
from shapes import SHAPES

BENCHES = pathlib.Path(__file__).resolve().parent
# Tokens of each request before its first step, and bytes that the GPU reads in a millisecond.
CONTEXT, BYTES_PER_MS = 128, 4.8e9
BATCHES = 1, 8, 64
LLAMA = ["--shape", "llama-8b"]

INTRODUCTION = """# Targets

What is asked of the engine's steps, as ratios, and what they took. `benches/targets.py` measures all of it in one run
on one GPU, one after the other, and writes this page. Contexts have 128 tokens. *Floor*: the time to read all weights
once at 4.8 TB/s, and that of a graph of as many kernels that do nothing. Where the time of a step goes is in
[steps.md](steps.md), and what was tried in [serve.md](../serve.md#time).
"""


class Measured:
    """What was measured, each by itself, so that one that fails leaves the others."""

    def __init__(self, seconds):
        self.end, self.failed = time.monotonic() + seconds, []

    def of(self, what, measure):
        try:
            return measure(max(self.end - time.monotonic(), 1))
        except (OSError, subprocess.SubprocessError, StopIteration, ValueError, KeyError) as error:
            said = str(getattr(error, "stderr", None) or error).strip().splitlines()
            self.failed.append(f"{what}: {said[-1] if said else type(error).__name__}")
            return None


def compiled(model):
    """What machine and versions PyTorch tells of, and the milliseconds of its compiled steps, by the number of
    requests."""

    def measure(seconds):
        command = [
            sys.executable, BENCHES / "hf_transformers.py", model, "--compiled", "--batch", *map(str, BATCHES),
            "--seconds", str(seconds),
        ]  # fmt: skip
        # It ends with an error where a size was left out.
        shown = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)
        lines = shown.stdout.splitlines()
        rows = [json.loads(line) for line in lines if line.startswith("{")]
        rows = {row["batch"]: row["ms_per_step"] for row in rows if "compiled" in row["engine"] and "error" not in row}
        if not rows:
            raise ValueError(shown.stderr.strip() or "nothing was measured")
        return lines[0], rows

    return measure


def served(args, clients):
    """The rows of the servers with so many clients, by name: llama.cpp's has as many slots."""

    def measure(seconds):
        with tempfile.TemporaryDirectory() as folder:
            result = pathlib.Path(folder) / "serving.json"
            command = [
                sys.executable, BENCHES / "serving.py", "--json", result, "--model", args.model,
                "--flashinfer", args.flashinfer, "--llama-server", args.llama_server, "--clients", clients,
                "--seconds", seconds,
            ]  # fmt: skip
            subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, timeout=seconds + 60)
            return {name: of["rows"][0] for name, of in json.loads(result.read_text()).items()}

    return measure


def read_once(weights_ms, requests):
    """The milliseconds in which weights, and keys and values of Llama 8B's requests, are read once."""
    shape = SHAPES["llama-3.1-8b"]
    token = shape.layers * 2 * shape.kv_heads * shape.head_dim * 2
    return weights_ms + requests * CONTEXT * token / BYTES_PER_MS


def targets(args, measured):
    """What machine it is, if that is known; then each target: its name, what was measured, what it is measured by,
    and the ratio that is asked for at most."""

    def steps(what, arguments):
        arguments = [*arguments, "--context", str(CONTEXT)]
        found = measured.of(what, lambda seconds: bench_steps.steps(args.flashinfer, arguments, seconds))
        return found or ({}, None)

    def step(rows, batch, name="step ms"):
        row = rows.get(str(batch))
        return row and float(row[name])

    small, _ = steps("SmolLM2's steps", [args.model, "--steps", "1,8,64"])
    large, weights = steps("Llama 8B's steps", [*LLAMA, "--steps", "1,8,64"])
    reduced, _ = steps("Llama 8B's steps of 8-bit weights", [*LLAMA, "--steps", "1", "--weights", "e4m3"])
    machine, torch = measured.of("PyTorch", compiled(args.model)) or (None, {})
    yield machine
    one, many = [measured.of(f"servers, clients: {clients}", served(args, clients)) or {} for clients in (1, 64)]

    def of_server(rows, name, key):
        value = rows.get(name, {}).get(key)
        return value["median"] if isinstance(value, dict) else value

    yield "SmolLM2, 1 request: step over floor", step(small, 1), step(small, 1, "floor ms"), 3.0
    yield "Llama 8B, `f16`, 1 request: step over floor", step(large, 1), step(large, 1, "floor ms"), 1.2
    once = weights and read_once(weights, 64)
    yield "Llama 8B, `f16`, 64 requests: step over weights, keys and values read once", step(large, 64), once, 1.25
    yield "Llama 8B, 1 request: `e4m3` weights over `f16`", step(reduced, 1), step(large, 1), 0.6
    for batch in BATCHES:
        name = f'SmolLM2, batch of {batch}: step over `torch.compile(mode="reduce-overhead")`'
        yield name, step(small, batch), torch.get(batch), 0.6
    latency = [of_server(one, name, "inter_token_latency_ms") for name in ("flashinfer", "llama.cpp")]
    yield "SmolLM2, served to 1 client: time per token over llama.cpp's", *latency, 1.0
    # Three times the tokens are a third of the time for each.
    rates = [of_server(many, name, "tokens_per_second") for name in ("flashinfer", "llama.cpp")]
    rates = [rate and 1e3 / rate for rate in rates]
    yield "SmolLM2, served to 64 clients: milliseconds for each token of all, over llama.cpp's", *rates, 1 / 3


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--flashinfer", required=True, help="the path of the program")
    parser.add_argument("--model", required=True, help="the path of SmolLM2's GGUF file")
    parser.add_argument("--llama-server", required=True, help="the path of llama.cpp's server")
    parser.add_argument("--seconds", type=float, default=580, help="what is not measured by then is left out")
    args = parser.parse_args()
    measured, lines = Measured(args.seconds), []
    machine, *rows = targets(args, measured)
    for name, got, beside, most in rows:
        known = got is not None and beside is not None
        ratio = f"{got / beside:.2f}" if known else "–"
        said = ("met" if got / beside <= most else "missed") if known else "not measured"
        numbers = [f"{number:.3f}" if number is not None else "–" for number in (got, beside)]
        lines.append([name, *numbers, ratio, f"{most:.2f}", said])
    print(INTRODUCTION)
    print(", ".join(filter(None, [time.strftime("%Y-%m-%d"), machine])) + ". Milliseconds.\n")
    print(table(["target", "engine", "beside", "ratio", "at most", ""], lines))
    for failed in measured.failed:
        print(f"\nNot measured: {failed}")
    if measured.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
