"""How fast servers of OpenAI's API answer: requests and tokens per second, time to the first token,
and inter-token latency, at several numbers of clients.

    python3 benches/serving.py --json serving.json --model MODEL.gguf \\
        --flashinfer target/release/flashinfer --steps --llama-server PATH

starts each server that is given by its path with the model, one after another, and ends it.
`--url NAME=http://HOST:PORT` measures one that runs. `--steps` also takes the time of the engine's
own steps (`flashinfer bench --steps`, on a GPU), which the report has beside the server's, and `--torch
SHAPE` what PyTorch needs for batches of as many requests (`torch_batch.py`). `random_gguf.py` writes
models of known shapes.

The whole run takes at most `--seconds`; what is not measured by then is left out, and said. Results
are added to the file, in place of those of the same name. `benches/serving_report.py` makes tables
and plots of it. Needs nothing but Python's standard library, and PyTorch for `--torch`.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

import bench_steps
from serving_load import Load, measure
from shapes import SHAPES

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "serve" / "tests" / "clients"))
from program import Program, free_port  # noqa: E402

# Requests of all clients together, at least.
LEAST_REQUESTS = 32
# What `--steps` without a shape is of.
MODEL = "model"


def started(args):
    """The servers that are given by a path: name, path of a page that is there when it is ready, and
    command."""
    most, tokens = max(args.clients), args.prompt_words * 2 + args.answer_tokens
    if args.flashinfer:
        yield "flashinfer", "/ready", [
            args.flashinfer, "serve", args.model, "--device", args.device, "--max-running", most,
            "--cache-tokens", most * tokens,
        ]  # fmt: skip
    if args.llama_server:
        yield "llama.cpp", "/health", [
            args.llama_server, "-m", args.model, "-ngl", "99", "-np", most, "-c", most * tokens,
        ]  # fmt: skip


def started_rows(args, name, ready, command, left):
    """Rows of a server, which runs as long."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder) / f"{name}.log"
        program = Program([*command, "--host", "127.0.0.1", "--port", port], url, log)
        try:
            program.wait_for(ready, max(left(), 1))
            yield from server_rows(args, url, left)
        finally:
            program.end(5)


def measured(args, left):
    """The name of all that is measured, in turn, and its rows."""
    for name, ready, command in started(args):
        yield name, started_rows(args, name, ready, command, left)
    for named in args.url:
        name, url = named.split("=", 1)
        yield name, server_rows(args, url.rstrip("/"), left)
    if args.torch:
        yield "PyTorch", torch_rows(args, left)


def steps(args, left):
    """The milliseconds of the engine's own steps, by the number of requests."""
    batches = ",".join(map(str, args.clients))
    model = [args.model] if args.steps == MODEL else ["--shape", args.steps]
    arguments = [*model, "--steps", batches, "--context", str(args.prompt_words)]
    rows, _ = bench_steps.steps(args.flashinfer, arguments, max(left(), 1))
    return {batch: float(row["step ms"]) for batch, row in rows.items()}


def torch_rows(args, left):
    """PyTorch's rows, as long as there is time."""
    command = [
        sys.executable, ROOT / "benches" / "torch_batch.py", args.torch, "--batch", *args.clients,
        "--prompt-tokens", args.prompt_words, "--answer-tokens", args.answer_tokens,
    ]  # fmt: skip
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as process:
        limit = threading.Timer(max(left(), 1), process.kill)
        limit.start()
        yield from map(json.loads, process.stdout)
        process.wait()
        limit.cancel()
    if process.returncode:
        raise RuntimeError(f"torch_batch.py ended with {process.returncode}")


def served_model(url, api_key):
    """The first model that a server lists."""
    request = urllib.request.Request(url + "/v1/models", headers={"Authorization": f"Bearer {api_key}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["data"][0]["id"]


def server_rows(args, url, left):
    """What is measured of a server, as long as there is time."""
    load = Load(url, served_model(url, args.api_key), args.api_key, args.prompt_words, args.answer_tokens)
    measure(load, 1, 2, 1, max(left(), 1))  # Does not count.
    for count in args.clients:
        requests = max(args.requests, -(-LEAST_REQUESTS // count))
        yield measure(load, count, requests, args.processes, max(left(), 1))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=pathlib.Path, required=True, help="where measurements are added")
    parser.add_argument("--model", help="for servers that are started: the path of a GGUF file")
    parser.add_argument("--flashinfer", help="the path of the program")
    parser.add_argument("--device", default="auto", help="of flashinfer")
    parser.add_argument(
        "--steps", nargs="?", const=MODEL, metavar="SHAPE",
        help="also the engine's own steps, on a GPU: of the model, or of a shape that `flashinfer bench` knows",
    )  # fmt: skip
    parser.add_argument("--llama-server", help="the path of llama.cpp's server")
    parser.add_argument("--torch", choices=SHAPES, help="also batches of a model of this shape in PyTorch")
    parser.add_argument("--url", action="append", default=[], metavar="NAME=URL", help="a server that runs")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY", "none"))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--requests", type=int, default=4, help="of each client, at least")
    parser.add_argument("--prompt-words", type=int, default=128)
    parser.add_argument("--answer-tokens", type=int, default=110)
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--seconds", type=float, default=200, help="of the whole run")
    args = parser.parse_args()
    if (args.flashinfer or args.llama_server) and not args.model:
        parser.error("--model is missing; expected the path of a GGUF file for the servers that are started")
    if args.steps and not args.flashinfer:
        parser.error("--steps needs --flashinfer, whose steps are measured")
    if any("=http://" not in url for url in args.url):
        parser.error("--url takes NAME=http://HOST:PORT")
    return args


def main():
    args, begin = arguments(), time.monotonic()

    def left():
        return args.seconds - (time.monotonic() - begin)

    def keep(name, result):
        results = json.loads(args.json.read_text()) if args.json.exists() else {}
        results[name] = {**results.get(name, {}), "date": time.strftime("%Y-%m-%d"), **result}
        args.json.write_text(json.dumps(results, indent=1) + "\n")

    failed = []
    for name, rows in measured(args, left):
        print(name, flush=True)
        kept = []
        keep(name, {"rows": kept, "steps_ms": {}})
        try:
            for row in rows:
                print(json.dumps(row), flush=True)
                kept.append(row)
                keep(name, {"rows": kept})
        except (OSError, RuntimeError, EOFError) as error:
            failed.append(f"{name}, after {len(kept)} of {len(args.clients)} numbers of clients: {error}")
    if args.steps:
        try:
            keep("flashinfer", {"steps_ms": steps(args, left)})
        except (OSError, subprocess.SubprocessError) as error:
            failed.append(f"flashinfer bench: {error} {getattr(error, 'stderr', '')}")
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
