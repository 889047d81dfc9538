"""How fast a server of OpenAI's API answers: requests and tokens per second, time to the first
token, and inter-token latency, at several numbers of clients.

    python3 benches/serving.py --name flashinfer --url http://127.0.0.1:8000 --json serving.json

Each client sends one request after another to /v1/completions and reads the stream. Prompts are
random words, so that no prefix is cached; answers have the same number of tokens each
(`ignore_eos`). Clients are divided among processes, and events are counted, not parsed, so that
the load generator is not what is measured. A request that fails ends the run.

A run adds its measurements to the file, or replaces those of the same name, so that several servers
can stand in one. `benches/serving_report.py` makes tables and plots of it. Needs nothing but
Python's standard library.
"""

import argparse
import asyncio
import dataclasses
import json
import multiprocessing
import os
import pathlib
import random
import time
import urllib.parse
import urllib.request

import http_stream

WORDS = """time year people way day man thing woman life child world school state family student group
country problem hand part place case week company system program question work government number night
point home water room mother area money story fact month lot right study book eye job word business
issue side kind head house service friend father power hour game line end member law car city""".split()


@dataclasses.dataclass
class Load:
    """What clients ask for."""

    url: str
    model: str
    api_key: str
    prompt_words: int
    answer_tokens: int
    timeout: float

    def body(self, generator):
        prompt = " ".join(generator.choices(WORDS, k=self.prompt_words))
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": self.answer_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


@dataclasses.dataclass
class Answer:
    """Times of one request, in seconds."""

    start: float
    first: float
    end: float
    # Between reads that brought text: the time, and the events that were read.
    gaps: list
    prompt_tokens: int
    answer_tokens: int


async def ask(load, generator):
    """One request, from sending it to the end of its stream."""
    start = time.perf_counter()
    first = last = usage = None
    gaps, tail = [], b""
    async for part in http_stream.post(load.url, "/v1/completions", load.body(generator), load.api_key):
        now = time.perf_counter()
        # An event may be divided among parts: what comes before its end is kept.
        *events, tail = (tail + part).split(b"\n\n")
        texts = 0
        for event in events:
            if b'"error"' in event:
                raise RuntimeError(f"the server ended a stream: {event[:500]!r}")
            if b'"prompt_tokens"' in event:
                usage = json.loads(event.split(b"data:", 1)[1])["usage"]
            texts += b'"text"' in event and b'"text":""' not in event and b'"text": ""' not in event
        if not texts:
            continue
        if first is None:
            first = now
        else:
            gaps.append((now - last, texts))
        last = now
    if first is None or usage is None:
        raise RuntimeError("a stream ended without a token, or without usage")
    if usage["completion_tokens"] != load.answer_tokens:
        raise RuntimeError(f"an answer has {usage['completion_tokens']} tokens, not {load.answer_tokens}")
    return Answer(start, first, last, gaps, usage["prompt_tokens"], usage["completion_tokens"])


async def clients(load, count, requests, seed):
    """Clients of one process, each with so many requests."""

    async def client(number):
        generator = random.Random(f"{seed}, {number}")
        return [await asyncio.wait_for(ask(load, generator), load.timeout) for _ in range(requests)]

    return [answer for answers in await asyncio.gather(*map(client, range(count))) for answer in answers]


def process(load, count, requests, seed, barrier, results):
    """Runs clients when all processes are ready."""
    try:
        barrier.wait(60)
        results.put((asyncio.run(clients(load, count, requests, seed)), None))
    except Exception as error:
        barrier.abort()
        results.put(([], f"{type(error).__name__}: {error}"))


def run(load, count, requests, processes):
    """All answers to so many clients."""
    processes = min(processes, count)
    shares = [count // processes + (index < count % processes) for index in range(processes)]
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.Queue()
    seed = random.SystemRandom().getrandbits(64)
    started = [
        context.Process(target=process, args=(load, share, requests, f"{seed}, {index}", barrier, results), daemon=True)
        for index, share in enumerate(shares)
    ]
    for one in started:
        one.start()
    ended = [results.get(timeout=load.timeout * requests + 120) for _ in started]
    for one in started:
        one.join()
    problems = [problem for _, problem in ended if problem and not problem.startswith("BrokenBarrierError")]
    if problems:
        raise SystemExit(f"{count} clients: {problems[0]}")
    return [answer for answers, _ in ended for answer in answers]


def quantile(values, share):
    values = sorted(values)
    return values[min(int(share * len(values)), len(values) - 1)]


def summary(values):
    """Of times in seconds, in milliseconds."""
    return {
        "mean": sum(values) / len(values) * 1e3,
        "median": quantile(values, 0.5) * 1e3,
        "p99": quantile(values, 0.99) * 1e3,
    }


def measure(load, count, requests, processes):
    """A row of the result. Its clocks are those of one machine, which all processes share."""
    answers = run(load, count, requests, processes)
    took = max(answer.end for answer in answers) - min(answer.start for answer in answers)
    # Events that came in one read share the time since the last one.
    gaps = [gap / texts for answer in answers for gap, texts in answer.gaps for _ in range(texts)]
    return {
        "clients": count,
        "requests": len(answers),
        "seconds": took,
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers) / len(answers),
        "answer_tokens": load.answer_tokens,
        "requests_per_second": len(answers) / took,
        "tokens_per_second": sum(answer.answer_tokens for answer in answers) / took,
        "time_to_first_token_ms": summary([answer.first - answer.start for answer in answers]),
        "inter_token_latency_ms": summary(gaps) if gaps else None,
        "request_ms": summary([answer.end - answer.start for answer in answers]),
    }


def steps(path):
    """The milliseconds of an engine's own step, by the number of requests, from the table that
    `flashinfer bench MODEL --steps N,…` printed."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in path.read_text().splitlines() if "|" in line]
    header, columns = rows[0], {}
    for row in rows[1:]:
        if row[0].isdigit():
            columns[row[0]] = float(row[header.index("step ms")])
    return columns


def served_model(url, api_key):
    """The first model that a server lists."""
    request = urllib.request.Request(url + "/v1/models", headers={"Authorization": f"Bearer {api_key}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["data"][0]["id"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--name", required=True, help="what the server is called in tables")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", help="the first that the server lists, unless it is said")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY", "none"))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--requests", type=int, default=4, help="of each client")
    parser.add_argument("--prompt-words", type=int, default=128)
    parser.add_argument("--answer-tokens", type=int, default=110)
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--timeout", type=float, default=300, help="seconds of one request")
    parser.add_argument("--steps", type=pathlib.Path, help="what `flashinfer bench MODEL --steps …` printed")
    parser.add_argument("--json", type=pathlib.Path, required=True, help="where measurements are added")
    args = parser.parse_args()
    url = args.url.rstrip("/")
    if urllib.parse.urlsplit(url).scheme != "http":
        parser.error(f"--url is {url}; expected http://HOST:PORT")
    model = args.model or served_model(url, args.api_key)
    load = Load(url, model, args.api_key, args.prompt_words, args.answer_tokens, args.timeout)
    measure(load, 1, 1, 1)  # Does not count.
    rows = []
    for count in args.clients:
        rows.append(measure(load, count, args.requests, args.processes))
        print(json.dumps(rows[-1]), flush=True)
    results = json.loads(args.json.read_text()) if args.json.exists() else {}
    results[args.name] = {"model": model, "date": time.strftime("%Y-%m-%d"), "rows": rows, "steps_ms": steps(args.steps) if args.steps else {}}
    args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
