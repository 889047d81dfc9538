"""What a hostile model or client can take of a server: memory and time, within bounds."""

import concurrent.futures
import json
import pathlib
import time
import urllib.error
import urllib.request

import pytest
import tiny_model

MIB = 1 << 20
BODY, VALUES = 8 * MIB, 1 << 20

# As many doublings as the message says.
DOUBLES = """{% set n = namespace(text='ab') %}{% for i in range(messages[0].content | int) %}\
{% set n.text = n.text ~ n.text %}{% endfor %}{{ n.text }}"""


def post(server, path, body, timeout=120):
    """The status of the answer, and its JSON."""
    request = urllib.request.Request(server.url + path, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def chat(server, text):
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 2}
    return post(server, "/v1/chat/completions", json.dumps(body).encode())


def peak(server):
    """The most bytes of memory that the server has had."""
    status = pathlib.Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def children(server):
    """The processes that a server has started, with their names."""
    found = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            stat, command = (folder / "stat").read_text(), (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if int(stat.rpartition(")")[2].split()[1]) == server.process.pid:
            found[folder] = command.split(b"\0")[0].decode()
    return found


def test_a_hostile_template_ends_no_server(serve, tmp_path):
    tiny_model.write(tmp_path / "hostile.gguf", template=DOUBLES)
    server = serve(tmp_path / "hostile.gguf", "--device", "simulated").ready()
    for _ in range(3):
        status, answer = chat(server, "3")
        assert status == 200, answer
        assert answer["usage"]["prompt_tokens"] == 8
        status, answer = chat(server, "60")
        assert (status, answer["error"]["param"]) == (400, "messages")
        said = "the model's chat template takes more than 1 GiB of memory, or nests too deep"
        assert answer["error"]["message"] == said
    # What it hands out is bounded, and not tokenized where it cannot fit.
    status, answer = chat(server, "26")
    assert (status, answer["error"]["message"]) == (400, "the model's chat template writes more than 64 MiB")
    status, answer = chat(server, "22")
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert peak(server) < 256 * MIB
    (process, name), = children(server).items()
    assert name == "flashinfer-templates"
    server.kill()
    deadline = time.monotonic() + 10
    while process.exists():
        assert time.monotonic() < deadline, "the process of templates lives on"
        time.sleep(0.05)


def filled(before, item, behind, values=1, separator=","):
    """A body as large as one may be, or with as many values, of which each item has some."""
    count = (BODY - len(before) - len(behind)) // (len(item) + len(separator))
    count = min(count, (VALUES - 100) // values) if values else count
    return (before + separator.join([item] * count) + behind).encode()


def large_bodies():
    """Bodies that take much of what there is, by what they have a lot of, with the path that takes them."""
    completion, chat = "/v1/completions", "/v1/chat/completions"
    ask = '{"messages":[{"role":"user","content":"a"}],"max_tokens":1,'
    schema = ask + '"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":{'
    maps = ask + '"chat_template_kwargs":{"x":['
    return {
        "prompts": (completion, filled('{"max_tokens":1,"prompt":[', '"a"', "]}")),
        "lists of tokens": (completion, filled('{"max_tokens":1,"prompt":[', "[1]", "]}", 2)),
        "tokens": (completion, filled('{"max_tokens":1,"prompt":[', "1", "]}")),
        "text": (completion, filled('{"max_tokens":1,"prompt":"', "abab", '"}', 0, "")),
        "fields": (completion, filled('{"max_tokens":1,"prompt":"a",', '"x":0', "}", 2)),
        "text to tokenize": ("/tokenize", filled('{"prompt":"', "abab", '","return_token_strs":true}', 0, "")),
        "tokens to text": ("/detokenize", filled('{"tokens":[', "300", "]}")),
        "messages": (chat, filled('{"max_tokens":1,"messages":[', '{"role":"user","content":"a"}', "]}", 5)),
        "text of a message": (chat, filled('{"max_tokens":1,"messages":[{"role":"user","content":"', "abab", '"}]}', 0, "")),
        "maps": (chat, filled(maps, '{"":0}', "]}}", 3)),
        "tools": (chat, filled(ask + '"tools":[', '{"type":"function","function":{"name":"f"}}', "]}", 6)),
        "schema": (chat, filled(schema + '"anyOf":[', '{"type":"string"}', "]}}}}", 3)),
    }  # fmt: skip


@pytest.mark.timeout(300)
def test_large_bodies_take_bounded_memory(serve_simulated):
    """Of each kind three at a time. `docs/reliability.md` has the figures of more."""
    for kind, (path, body) in large_bodies().items():
        server, begin = serve_simulated().ready(), time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(3) as threads:
            answers = [threads.submit(post, server, path, body) for _ in range(3)]
            slowest = 0
            while not all(answer.done() for answer in answers):
                asked = time.monotonic()
                assert post(server, "/tokenize", b'{"prompt":"a"}')[0] == 200
                slowest = max(slowest, time.monotonic() - asked)
                time.sleep(0.02)
        statuses = {answer.result()[0] for answer in answers}
        print(
            f"{kind:18} {len(body) / MIB:.1f} MiB: {statuses}, {time.monotonic() - begin:.1f} s, "
            f"{peak(server) / MIB:.0f} MiB, small ones within {slowest * 1000:.0f} ms"
        )  # fmt: skip
        assert statuses <= {200, 400}
        assert peak(server) < 1536 * MIB
        assert slowest < 10
        server.end()
