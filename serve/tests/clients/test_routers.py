"""Two replicas behind vllm-router and smg, of which one is killed."""

import concurrent.futures
import pathlib
import sys
import time

import openai
import pytest
from conftest import client_of
from program import Program, free_port

# As docs/deploy.md says them.
ROUTERS = {
    "vllm-router": ["vllm-router", "--policy", "round_robin", "--worker-startup-timeout-secs", "600"],
    "smg": ["smg", "launch", "--policy", "round_robin", "--worker-startup-timeout-secs", "600"],
}
KEY = "open-sesame"
HELLO = [{"role": "user", "content": "Say something."}]
# What a router says of a replica that is gone: it could not reach one, or none could be reached.
REFUSED = {429, 500, 502, 503, 504}


class Router(Program):
    def __init__(self, name, replicas, log):
        port = free_port()
        command, *options = ROUTERS[name]
        program = pathlib.Path(sys.executable).with_name(command)
        where = ["--host", "127.0.0.1", "--port", port, "--prometheus-port", free_port(), "--api-key", KEY]
        workers = ["--worker-urls", *[replica.url for replica in replicas]]
        super().__init__([program, *options, *where, *workers], f"http://127.0.0.1:{port}", log)

    @property
    def v1(self):
        return self.url + "/v1"


@pytest.fixture(params=ROUTERS)
def routed(request, serve_simulated, tmp_path):
    """A router, and its two replicas. All of them want a key."""
    replicas = [serve_simulated("--api-key", KEY) for _ in range(2)]
    for replica in replicas:
        replica.ready()
    router = Router(request.param, replicas, tmp_path / "router.log")
    try:
        router.wait_for("/health")
        wait_for_models(client_of(router, KEY))
        yield router, replicas
    finally:
        router.end(5)
        for replica in replicas:
            replica.end()


def wait_for_models(client):
    """Waits until the router knows what its replicas serve."""
    for _ in range(200):
        try:
            if client.models.list().data:
                return
        except openai.APIError:
            pass
        time.sleep(0.1)
    raise TimeoutError("the router lists no models")


def chat(client, model, **options):
    return client.chat.completions.create(model=model, messages=HELLO, temperature=0, **options)


def outcome(client, model, tokens, stream):
    """How a request ends: with its text, or with the status of a refusal, or as a stream that breaks off."""
    asked = dict(max_tokens=tokens, extra_body={"ignore_eos": True})
    try:
        if not stream:
            return chat(client, model, **asked).choices[0].message.content
        text, finish = "", None
        for chunk in chat(client, model, stream=True, **asked):
            for choice in chunk.choices:
                text, finish = text + (choice.delta.content or ""), choice.finish_reason or finish
        return text if finish else None
    except openai.APIStatusError as error:
        return error.status_code
    except openai.APIError:
        return None


def test_requests_are_divided_and_one_replica_may_die(routed):
    router, replicas = routed
    client = client_of(router, KEY)
    model = client_of(replicas[0], KEY).models.list().data[0].id
    assert outcome(client_of(router, "wrong"), model, 4, False) == 401
    lengths = [20, 200]
    # Both replicas compute the same.
    whole = {tokens: outcome(client_of(replicas[0], KEY), model, tokens, False) for tokens in lengths}
    before = [replica.metric("vllm:prompt_tokens_total") for replica in replicas]

    def send(pool, count):
        return [
            (lengths[index % 2], pool.submit(outcome, client, model, lengths[index % 2], index % 4 < 2))
            for index in range(count)
        ]

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        assert all(sent.result() == whole[tokens] for tokens, sent in send(pool, 32))
        divided = [replica.metric("vllm:prompt_tokens_total") for replica in replicas]
        assert all(after > earlier for after, earlier in zip(divided, before)), divided

        sent = send(pool, 64)
        next(concurrent.futures.as_completed([one for _, one in sent]))
        replicas[1].kill()
        ends = [(tokens, one.result()) for tokens, one in sent]
        lost = [end for tokens, end in ends if end != whole[tokens]]
        # What was not answered in full was refused, or seen to break off.
        assert all(end is None or end in REFUSED for end in lost), lost
        assert len(lost) < len(ends)

        # The router has learned of it: what comes now is answered.
        for _ in range(40):
            again = [one.result() == whole[tokens] for tokens, one in send(pool, 8)]
            if all(again):
                break
        assert all(again), router.output()
    replicas[0].wait_until_idle()


def test_a_client_that_leaves_ends_its_request_behind_a_router(routed):
    router, replicas = routed
    client = client_of(router, KEY)
    model = client_of(replicas[0], KEY).models.list().data[0].id
    streams = [chat(client, model, stream=True, max_tokens=4000, extra_body={"ignore_eos": True}) for _ in range(4)]
    for stream in streams:
        for _ in range(3):
            next(stream)
    assert sum(replica.load() for replica in replicas) == 4
    for stream in streams:
        stream.close()
    for replica in replicas:
        replica.wait_until_idle(10)
