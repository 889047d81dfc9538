#!/usr/bin/env python3
"""Writes the seeds of all targets: small inputs that reach far, and what was once a fault.

    python3 fuzz/seeds.py
"""

import base64
import hashlib
import io
import json
import pathlib
import struct
import zipfile

SEEDS = pathlib.Path(__file__).parent / "seeds"


def seed(target, name, content):
    folder = SEEDS / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def digest(content):
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def record(members):
    return "".join(f"{name},sha256={digest(content)},{len(content)}\n" for name, content in members.items())


def wheel(distribution, members, compression=zipfile.ZIP_DEFLATED):
    members = {name: content.encode() for name, content in members.items()}
    place = f"{distribution}.dist-info/RECORD"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, compression)
        archive.writestr(zipfile.ZipInfo(place), record(members) + f"{place},,\n", compression)
    return out.getvalue()


def manifest(**changes):
    told = dict(
        schema_version=1, provider_id="sm90a", distribution="flashinfer-jit-cache-sm90a", version="0.7.4",
        cuda_architectures=["sm_90a"], modules=["norm"])
    return json.dumps(told | changes)


def wheels():
    module = "flashinfer_jit_cache/jit_cache/norm/norm.so"
    plain = {module: "norm" * 20, "tvm_ffi/lib/libtvm_ffi.so": "ffi"}
    seed("wheel", "deflated", wheel("flashinfer_jit_cache-0.6.13", plain))
    seed("wheel", "stored", wheel("flashinfer_jit_cache-0.6.13", plain, zipfile.ZIP_STORED))
    folder = "flashinfer_jit_cache/providers/sm90a"
    seed("wheel", "provider", wheel("flashinfer_jit_cache_sm90a-0.7.4", {
        f"{folder}/jit_cache/norm/norm.so": "norm", f"{folder}/manifest.json": manifest()}))
    shim = "Name: flashinfer-jit-cache\nRequires-Dist: flashinfer-jit-cache-sm90a (==0.7.4)\n\n"
    seed("wheel", "shim", wheel("flashinfer_jit_cache-0.7.4", {
        "flashinfer_jit_cache-0.7.4.dist-info/METADATA": shim}))
    seed("record", "plain", record({"a/b.so": b"x", "c.dist-info/METADATA": b"", module: b"norm"}) + "c,,\n")
    seed("record", "quoted", f'"a,""b"".so",sha256={digest(b"")},0\nb,md5=00,3\n')
    seed("manifest", "provider", manifest())
    seed("manifest", "others", manifest(cuda_architectures=["sm_120f", "100a"], modules=[]))
    seed("manifest", "shim", shim)


def indexes():
    seed("index_page", "html", """<!DOCTYPE html><html><head><base href="/files/"></head><body>
<!-- <a href="no.whl"> --><script>"<a href='no'>"</script>
<a href='pkg-1%2Bcu.whl#sha256=ab&amp;y=1' data-requires-python="&gt;=3">x</a><a href=../two.whl?q>y</a>""")
    seed("index_page", "json", json.dumps({"meta": {"api-version": "1.0"}, "files": [
        {"filename": "a.whl", "url": "../a.whl", "hashes": {"sha256": "ab"}},
        {"filename": "b.whl", "url": "https://o.example/b.whl"}]}))
    row = f'sha256 = "{"ab" * 32}"\n'
    table = "package.metadata.flashinfer_rs.pinned_wheels"
    seed("pins", "registry", f"""[{table}.my_model.any.any]
file = "my_model-1.0-py3-none-any.whl"
{row}package = "my-model"
version = "1.0"
record_{row}""")
    seed("pins", "url", f"""[{table}.flashinfer_jit_cache_sm90a.cu130.x86_64]
file = "a.whl"
{row}url = "https://user:word@files.example/a.whl"
""")
    seed("pins", "version", "0.6.18.post1+cu130")
    seed("pins", "cuda", "cu13.0.88")


def functions():
    for which in (0, 3, 40):
        seed("printed_signature", f"of_{which}", bytes([which]) +
             b"Mismatched: `rmsnorm(0: DLTensor*, 1: Optional<DLTensor*>, 2: float, 3: bool) -> void`. Expected 4")
    seed("printed_signature", "nothing", b"\0f() -> Array<int>")
    seed("module_name", "norm", "norm\nno*m")
    seed("module_name", "decode", "batch_decode_with_kv_cache_dtype_q_f16_head_dim_qk_128\nbatch_*_dtype_q_f16_*128")
    seed("module_name", "folders", "model/../a.gguf\n*")
    # Each star was once tried at each place.
    seed("module_name", "stars", "a" * 60 + "\n" + "*a" * 20 + "b")


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(of):
    if isinstance(of, bool):
        return struct.pack("<I?", 7, of)
    if isinstance(of, int):
        return struct.pack("<II", 4, of)
    if isinstance(of, float):
        return struct.pack("<If", 6, of)
    if isinstance(of, str):
        return struct.pack("<I", 8) + text(of)
    kind = {int: 5, float: 6, str: 8}[type(of[0])]
    code = {int: "<i", float: "<f"}.get(kind_type := type(of[0]))
    items = b"".join(text(item) if kind_type is str else struct.pack(code, item) for item in of)
    return struct.pack("<IIQ", 9, kind, len(of)) + items


def gguf(metadata, tensors):
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, of in metadata.items():
        head += text(key) + value(of)
    at, data = 0, b""
    for name, shape in tensors.items():
        head += text(name) + struct.pack("<I", len(shape))
        head += b"".join(struct.pack("<Q", dim) for dim in reversed(shape)) + struct.pack("<IQ", 0, len(data))
        count = 1
        for dim in shape:
            count *= dim
        data += b"".join(struct.pack("<f", (at + index) % 7 / 8 - 0.375) for index in range(count))
        data += bytes(-len(data) % 32)
        at += count
    return head + bytes(-len(head) % 32) + data


def model(architecture, tokenizer, **more):
    width, inner, vocab = 8, 12, len(tokenizer["tokenizer.ggml.tokens"])
    metadata = {"general.architecture": architecture} | {f"{architecture}.{key}": of for key, of in {
        "block_count": 1, "context_length": 32, "embedding_length": width, "feed_forward_length": inner,
        "attention.head_count": 1, "attention.layer_norm_rms_epsilon": 1e-5}.items()} | more | tokenizer
    layer = {
        "attn_norm": [width], "attn_q": [width, width], "attn_k": [width, width], "attn_v": [width, width],
        "attn_output": [width, width], "ffn_norm": [width], "ffn_gate": [inner, width],
        "ffn_up": [inner, width], "ffn_down": [width, inner]}
    if architecture == "qwen3":
        layer |= {"attn_q_norm": [width], "attn_k_norm": [width]}
    tensors = {"token_embd.weight": [vocab, width], "output_norm.weight": [width]}
    return gguf(metadata, tensors | {f"blk.0.{name}.weight": shape for name, shape in layer.items()})


def tokenizer(kind, tokens, types, **more):
    told = {"model": kind, "tokens": tokens, "token_type": types, "bos_token_id": 0, "eos_token_id": 1} | more
    return {f"tokenizer.ggml.{key}": of for key, of in told.items()}


def models():
    chat = {"tokenizer.chat_template": "{% for m in messages %}<s>{{ m.content }}{% endfor %}"}
    byte_level = tokenizer(
        "gpt2", ["<s>", "</s>", "a", "b", "Ġ", "ab"], [3, 3, 1, 1, 1, 1], merges=["a b"], pre="gpt-2")
    pieces = tokenizer(
        "llama", ["<s>", "</s>", "<unk>", "▁", "a", "▁a", "<0x62>"], [3, 3, 2, 1, 1, 1, 6],
        scores=[0.0, 0.0, 0.0, -1.0, -2.0, -3.0, 0.0])
    seed("gguf", "llama", model("llama", pieces))
    seed("gguf", "qwen3", model("qwen3", byte_level | chat))
    rope = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0,
            "llama.rope.dimension_count": 4, "llama.attention.sliding_window": 4}
    seed("gguf", "long", model("llama", byte_level, **rope))
    seed("gguf", "layers", model("llama", pieces, **{"llama.block_count": 2**31 + 1}))
    seed("gguf", "wide_heads", model("llama", pieces, **{"llama.attention.key_length": 2**31}))


def texts():
    for which, of in enumerate(["Hello, world! It's 12345.\n\n\tfn x()", "東京 🦀é½ ²³\u0301", "<s></s> a  b   c",
                                "a" * 40 + " " * 40, "\r\n\u200b\ufeff\u00a0x"]):
        seed("tokenizer", f"text_{which}", bytes([which * 7]) + of.encode())
    # The last tokenizer, to which the mark of spaces is one.
    seed("tokenizer", "mark_of_spaces", b"\xe6" + "a \u2581b".encode())
    seed("tokenizer", "bytes", b"\x05\xff\xfe\x80a\xc3")
    for name, template in {
        "loop": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>{% endfor %}",
        "macro": "{% macro say(m) %}{{ m['content'].split('x')[0] }}{% endmacro %}{{ say(messages[0]) }}",
        "tools": "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{{ raise_exception('no') }}",
        "state": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
                 "{{ ns.n }}{{ strftime_now('%d %b %Y') }}{% generation %}{{ '<s>' }}{% endgeneration %}",
    }.items():
        seed("chat_template", name, f"{template}\0a <s> question\0an answer")


def bodies():
    user = [{"role": "user", "content": "ab"}]
    function = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
    for name, body in {
        "chat": dict(messages=user, max_tokens=2, temperature=0.5, top_p=0.9, seed=1, logprobs=True, top_logprobs=2),
        "stream": dict(messages=user, stream=True, stream_options={"include_usage": True}, max_tokens=2, stop=["b"]),
        "tools": dict(messages=user, tools=[{"type": "function", "function": function}], tool_choice="auto", max_tokens=2),
        "parts": dict(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}]},
                                {"role": "assistant", "content": None, "tool_calls": [
                                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
                                {"role": "tool", "tool_call_id": "1", "content": "b"}], n=2, max_tokens=1),
        "schema": dict(messages=user, max_tokens=2, response_format={"type": "json_schema", "json_schema": {
            "name": "x", "schema": {"type": "object", "properties": {"a": {"enum": [1, "b"]}}}}}),
    }.items():
        seed("http_body", f"chat_{name}", b"\0" + json.dumps(body).encode())
    seed("http_body", "completion", b"\1" + json.dumps(dict(
        prompt=["ab", "b"], max_tokens=2, echo=True, logprobs=1, logit_bias={"3": -100}, min_tokens=1)).encode())
    seed("http_body", "ids", b"\1" + json.dumps(dict(prompt=[[2, 3]], max_tokens=1, ignore_eos=True)).encode())
    seed("http_body", "regex", b"\1" + json.dumps(dict(prompt="a", max_tokens=2, guided_regex="a(b|c)*")).encode())
    seed("http_body", "tokenize", b"\2" + json.dumps(dict(prompt="ab", add_special_tokens=False)).encode())
    seed("http_body", "detokenize", b"\3" + json.dumps(dict(tokens=[2, 3, 99999])).encode())


if __name__ == "__main__":
    for write in (wheels, indexes, functions, models, texts, bodies):
        write()
