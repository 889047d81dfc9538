"""What a hostile model or client can take of a server: memory and time, within bounds."""

import concurrent.futures
import json
import os
import pathlib
import time
import urllib.error
import urllib.request

import pytest
import tiny_model

MIB = 1 << 20
BODY, VALUES = 8 * MIB, 1 << 20

# As many doublings as the message says, or as deep a list, which is written.
HOSTILE = """{% set n = namespace(text='ab') %}{% for i in range(messages[0].content | replace('deep ', '') | int) %}\
{% if 'deep' in messages[0].content %}{% set n.text = [n.text] %}{% else %}{% set n.text = n.text ~ n.text %}{% endif %}\
{% endfor %}{{ n.text }}"""


def post(server, path, body, timeout=120):
    """The status of the answer, and its bytes."""
    request = urllib.request.Request(server.url + path, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def chat(server, text):
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 2}
    status, answer = post(server, "/v1/chat/completions", json.dumps(body).encode())
    return status, json.loads(answer)


def peak(process):
    """The most bytes of memory that a process has had, by its folder; 0 if it has ended."""
    try:
        status = (process / "status").read_text()
    except OSError:
        return 0
    return int(status.partition("VmHWM:")[2].split()[0]) << 10 if "VmHWM:" in status else 0


def folder(server):
    return pathlib.Path("/proc") / str(server.process.pid)


def state(process):
    """The letter of what a process is doing."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def children(server):
    """The processes that a server has started, with their names."""
    found = {}
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            stat, command = (process / "stat").read_text(), (process / "cmdline").read_bytes()
        except OSError:
            continue
        if int(stat.rpartition(")")[2].split()[1]) == server.process.pid:
            found[process] = command.split(b"\0")[0].decode()
    return found


def test_a_hostile_template_ends_no_server(serve, tmp_path):
    tiny_model.write(tmp_path / "hostile.gguf", template=HOSTILE)
    server = serve(tmp_path / "hostile.gguf", "--device", "simulated").ready()
    for _ in range(3):
        status, answer = chat(server, "3")
        assert status == 200, answer
        assert answer["usage"]["prompt_tokens"] == 8
        for text in ("60", "deep 90000"):
            status, answer = chat(server, text)
            assert (status, answer["error"]["param"]) == (400, "messages")
            said = "the model's chat template takes more than 1 GiB of memory, or nests too deep"
            assert answer["error"]["message"] == said
        status, answer = chat(server, "deep 500")
        assert (status, answer["usage"]["prompt_tokens"]) == (200, 1003)
    # What it hands out is bounded, and not tokenized where it cannot fit.
    status, answer = chat(server, "26")
    assert (status, answer["error"]["message"]) == (400, "the model's chat template writes more than 64 MiB")
    status, answer = chat(server, "22")
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert peak(folder(server)) < 256 * MIB
    (process, name), = children(server).items()
    assert name == "flashinfer-templates"
    server.kill()
    deadline = time.monotonic() + 10
    while state(process) not in (None, "Z"):
        assert time.monotonic() < deadline, "the process of templates lives on"
        time.sleep(0.05)


def filled(before, item, behind, values=1, separator=","):
    """A body as large as one may be, or with as many values, of which each item has some."""
    count = (BODY - len(before) - len(behind)) // (len(item) + len(separator))
    count = min(count, (VALUES - 100) // values) if values else count
    return (before + separator.join([item] * count) + behind).encode()


def large_bodies():
    """Bodies that take much of what there is, by what they have a lot of, with the path that takes them, and which
    parameter has too much of it, if any."""
    completions, chats = "/v1/completions", "/v1/chat/completions"
    ask = '{"messages":[{"role":"user","content":"a"}],"max_tokens":1,'
    schema = ask + '"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":{'
    maps = ask + '"chat_template_kwargs":{"x":['
    call = '{"role":"assistant","tool_calls":[{"id":"","type":"function","function":{"name":"f","arguments":"{'
    arguments = '{"max_tokens":1,"messages":[' + call + '\\"x\\":['
    message = '{"max_tokens":1,"messages":[{"role":"user","content":"'
    return {
        "prompts": (completions, filled('{"max_tokens":1,"prompt":[', '"a"', "]}"), "n"),
        "lists of tokens": (completions, filled('{"max_tokens":1,"prompt":[', "[1]", "]}", 2), "n"),
        "tokens": (completions, filled('{"max_tokens":1,"prompt":[', "1", "]}"), "prompt"),
        "text": (completions, filled('{"max_tokens":1,"prompt":"', "abab", '"}', 0, ""), "prompt"),
        "fields": (completions, filled('{"max_tokens":1,"prompt":"a",', '"x":0', "}", 2), None),
        "text to tokenize": ("/tokenize", filled('{"prompt":"', "abab", '","return_token_strs":true}', 0, ""), "prompt"),
        "tokens to text": ("/detokenize", filled('{"tokens":[', "300", "]}"), None),
        "messages": (chats, filled('{"max_tokens":1,"messages":[', '{"role":"user","content":"a"}', "]}", 5), "messages"),
        "text of a message": (chats, filled(message, "abab", '"}]}', 0, ""), "messages"),
        "maps": (chats, filled(maps, '{"":0}', "]}}", 3), None),
        "tools": (chats, filled(ask + '"tools":[', '{"type":"function","function":{"name":"f"}}', "]}", 7), "messages"),
        "arguments": (chats, filled(arguments, "[]", ']}"}}]}]}', 2), "messages"),
        "schema": (chats, filled(schema + '"anyOf":[', '{"type":"string"}', "]}}}}", 3), "response_format"),
    }  # fmt: skip


@pytest.mark.timeout(1200)
def test_large_bodies_take_bounded_memory(serve_simulated, request):
    """`--large-bodies` says how many of each kind at a time."""
    count = request.config.getoption("--large-bodies")
    turns = max(1, min(len(os.sched_getaffinity(0)), 16) // 4)
    for kind, (path, body, wrong) in large_bodies().items():
        server, begin = serve_simulated().ready(), time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(count) as threads:
            answers = [threads.submit(post, server, path, body, 600) for _ in range(count)]
            slowest = templates = 0
            while not all(answer.done() for answer in answers):
                asked = time.monotonic()
                status, answer = chat(server, "a")
                assert status == 200, answer
                slowest = max(slowest, time.monotonic() - asked)
                templates = max(templates, *map(peak, children(server)), 0)
                time.sleep(0.02)
        for answer in answers:
            status, answer = answer.result()
            assert status == (400 if wrong else 200), answer
            assert not wrong or json.loads(answer)["error"]["param"] == wrong, answer
        print(
            f"{kind:18} {len(body) / MIB:.1f} MiB: {time.monotonic() - begin:.1f} s, "
            f"{peak(folder(server)) / MIB:.0f} MiB, and {templates / MIB:.0f} for templates, "
            f"small chats within {slowest * 1000:.0f} ms"
        )  # fmt: skip
        # Some are worked on, and the others held; what was freed may be kept for a while.
        assert peak(folder(server)) < (turns + 2) * 640 * MIB + count * BODY
        assert slowest < 10
        server.end()
