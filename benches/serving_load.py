"""Clients of a server of OpenAI's API, and what they measure.

Each sends one request after another to /v1/completions and reads the stream. Clients are divided
among processes, and events are counted, not parsed, so that the load generator is not what is
measured. A request that fails ends the load.
"""

import asyncio
import dataclasses
import json
import multiprocessing
import queue
import random
import time

import http_stream

WORDS = """time year people way day man thing woman life child world school state family student group
country problem hand part place case week company system program question work government number night
point home water room mother area money story fact month lot right study book eye job word business
issue side kind head house service friend father power hour game line end member law car city""".split()


@dataclasses.dataclass
class Load:
    """What clients ask for: to continue random words, of which no prefix is cached."""

    url: str
    model: str
    api_key: str
    prompt_words: int
    answer_tokens: int

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
            # The key, and not an answer that says so: quotes in text are escaped.
            if b'"error":' in event:
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
    return Answer(start, first, last, gaps, usage["prompt_tokens"])


async def clients(load, count, requests, seed):
    """Clients of one process, each with so many requests."""

    async def client(number):
        generator = random.Random(f"{seed}, {number}")
        return [await ask(load, generator) for _ in range(requests)]

    return [answer for answers in await asyncio.gather(*map(client, range(count))) for answer in answers]


def process(load, count, requests, seed, barrier, results):
    """Runs clients when all processes are ready."""
    try:
        barrier.wait(60)
        results.put((asyncio.run(clients(load, count, requests, seed)), None))
    except Exception as error:
        results.put(([], f"{type(error).__name__}: {error}"))


def run(load, count, requests, processes, seconds):
    """All answers to so many clients. Raises `RuntimeError` if a request fails, and `TimeoutError` if
    they are not there in so many seconds."""
    processes = min(processes, count)
    shares = [count // processes + (index < count % processes) for index in range(processes)]
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.Queue()
    seed = random.SystemRandom().getrandbits(64)
    started = [
        context.Process(target=process, args=(load, share, requests, f"{seed}, {index}", barrier, results), daemon=True)
        for index, share in enumerate(shares)
    ]
    deadline, answers = time.monotonic() + seconds, []
    try:
        for one in started:
            one.start()
        for _ in started:
            some, problem = results.get(timeout=max(deadline - time.monotonic(), 0.1))
            if problem:
                raise RuntimeError(problem)
            answers += some
    except queue.Empty:
        raise TimeoutError(f"not all answers came in {seconds:.0f} s") from None
    finally:
        for one in started:
            one.kill()
            one.join()
    return answers


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


def measure(load, count, requests, processes, seconds):
    """A row of the result. Its clocks are those of one machine, which all processes share."""
    answers = run(load, count, requests, processes, seconds)
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
        "tokens_per_second": len(answers) * load.answer_tokens / took,
        "time_to_first_token_ms": summary([answer.first - answer.start for answer in answers]),
        "inter_token_latency_ms": summary(gaps) if gaps else None,
        "request_ms": summary([answer.end - answer.start for answer in answers]),
    }
