"""Load: 512 connections, prompts and answers of all lengths, and a third of the clients leave midway.

Nothing is lost, each answer is the one that its prompt gets alone, all pages come back, and memory
does not grow. `test_load.py` does this with the stand-in; by hand, with a model:

    python3 serve/tests/clients/load.py --flashinfer target/release/flashinfer --seconds 120 \\
        smollm2 --device gpu --deterministic

What follows are arguments of `flashinfer serve`. Needs aiohttp and nothing else.
"""

import argparse
import asyncio
import collections
import json
import pathlib
import random
import tempfile
import time

import aiohttp
from server import Server

CONNECTIONS = 512
# Of prompts and their answers' lengths.
CASES = 48
WORDS = "the of and to in is that for it as was with be by on not he his but at are this have from".split()


def case(generator):
    """A prompt of 1 to 600 words, most of them short, and an answer of 1 to 120 tokens."""
    words = int(600 ** generator.random())
    return {
        "prompt": " ".join(generator.choices(WORDS, k=words)),
        "max_tokens": generator.randint(1, 120),
        "temperature": 0,
        "ignore_eos": True,
    }


async def whole(session, body):
    """An answer that comes at once."""
    async with session.post("/v1/completions", json=body) as answer:
        text = await answer.text()
        assert answer.status == 200, (answer.status, text)
        return json.loads(text)["choices"][0]["text"]


async def streamed(session, body, leave_after=None):
    """An answer that comes in pieces; None if the client left before its end."""
    text, events, done = "", 0, False
    async with session.post("/v1/completions", json={**body, "stream": True}) as answer:
        assert answer.status == 200, (answer.status, await answer.text())
        async for line in answer.content:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                done = True
                continue
            chunk = json.loads(data)
            assert "error" not in chunk, chunk
            text += chunk["choices"][0]["text"]
            events += 1
            if events == leave_after:
                answer.close()
                return None
    assert done, "a stream broke off"
    return text


async def client(session, cases, seed, end, seen):
    """Sends one request after another."""
    generator = random.Random(seed)
    while time.monotonic() < end:
        body, alone = generator.choice(cases)
        kind = generator.choice(["leaves", "streams", "waits"])
        if kind == "leaves":
            got = await streamed(session, body, leave_after=generator.randint(1, body["max_tokens"]))
        elif kind == "streams":
            got = await streamed(session, body)
        else:
            got = await whole(session, body)
        seen[kind] += 1
        assert got is None or got == alone, (body, got, alone)


async def load(server, seconds):
    """All clients; what they saw, and the server's memory meanwhile."""
    generator, seen, memory = random.Random(1), collections.Counter(), []
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=240)
    async with aiohttp.ClientSession(server.url, connector=connector, timeout=timeout) as session:
        async with session.get("/v1/models") as models:
            model = {"model": (await models.json())["data"][0]["id"]}
        bodies = [{**case(generator), **model} for _ in range(CASES)]
        cases = [(body, await whole(session, body)) for body in bodies]
        end = time.monotonic() + seconds
        clients = [asyncio.create_task(client(session, cases, seed, end, seen)) for seed in range(CONNECTIONS)]

        async def watch():
            while time.monotonic() < end:
                memory.append(server.memory())
                await asyncio.sleep(seconds / 40)

        await asyncio.gather(*clients, watch())
    return seen, memory


def check(server, seconds):
    """Loads a server that is ready, and looks at what has come of it. A line that says so."""
    seen, memory = asyncio.run(load(server, seconds))
    assert sum(seen.values()) >= CONNECTIONS
    assert all(seen[kind] > CONNECTIONS / 10 for kind in ("leaves", "streams", "waits")), seen
    server.wait_until_idle(10)
    ended = server.metric("vllm:request_success_total")
    assert ended == sum(seen.values()) + CASES
    # After a quarter of the time all connections are busy, and the rest adds nothing.
    early, late = max(memory[len(memory) // 4 : len(memory) // 2]), max(memory[-len(memory) // 4 :])
    assert late < early * 1.1 + (16 << 20), [bytes >> 20 for bytes in memory]
    return f"{dict(seen)} in {seconds:g} s; memory from {memory[0] >> 20} to {memory[-1] >> 20} MiB"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--flashinfer", default="target/release/flashinfer", help="the program")
    parser.add_argument("--seconds", type=float, default=120)
    args, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(args.flashinfer, pathlib.Path(folder) / "log", *options)
        try:
            print(check(server.ready(), args.seconds))
        finally:
            server.end()


if __name__ == "__main__":
    main()
