"""FlashInfer's Python API, measured by the benchmark `kernels`.

Reads one order in JSON from each line, and answers with one line of JSON.
"""

import json
import os
import sys
import time

# Whatever else is printed must not mix with the answers.
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def say(**answer):
    print(json.dumps(answer), file=answers, flush=True)


try:
    import torch

    import flashinfer

    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch finds no GPU")
except Exception as error:
    say(error=f"{type(error).__name__}: {error}"[:300])
    sys.exit()

PERIOD = 1 << 20
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
workspace = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
index = torch.arange(PERIOD, dtype=torch.int64)
pattern = (((index * 2654435761) & 0xFFFFFFFF) >> 16).float() / 32768.0 - 1.0


def numbers(dtype, *shape):
    """Those that the Rust side has, too."""
    period, out = pattern.to(DTYPES[dtype]).cuda(), torch.empty(*shape, dtype=DTYPES[dtype], device="cuda")
    flat = out.view(-1)
    whole = flat.numel() // PERIOD * PERIOD
    if whole:
        flat[:whole].view(-1, PERIOD).copy_(period)
    flat[whole:] = period[: flat.numel() - whole]
    return out


def probabilities(rows, vocab):
    row = (pattern[:vocab] + 1.0) ** 8
    return (row.double() / row.double().sum()).float().cuda().repeat(rows, 1)


def pages_of(order):
    """Offsets, page numbers and lengths of the last pages: the second on the device."""
    batch, pages = order["batch"], order["tokens"] // order["page_size"]
    indptr = torch.arange(batch + 1, dtype=torch.int32) * pages
    indices = torch.arange(batch * pages, dtype=torch.int32, device="cuda")
    return indptr, indices, torch.full((batch,), order["page_size"], dtype=torch.int32)


def cache_of(order):
    pages = order["batch"] * order["tokens"] // order["page_size"]
    shape = (pages, order["page_size"], order["kv_heads"], order["head_dim"])
    return numbers(order["dtype"], *shape), numbers(order["dtype"], *shape)


def rmsnorm(order):
    rows, d, dtype = order["rows"], order["d"], order["dtype"]
    x, weight = numbers(dtype, rows, d), numbers(dtype, d)
    out = torch.empty_like(x)
    return None, lambda: flashinfer.norm.rmsnorm(x, weight, 1e-6, out=out)


def fused_add_rmsnorm(order):
    rows, d, dtype = order["rows"], order["d"], order["dtype"]
    x, residual, weight = numbers(dtype, rows, d), numbers(dtype, rows, d), numbers(dtype, d)
    return None, lambda: flashinfer.norm.fused_add_rmsnorm(x, residual, weight, 1e-6)


def silu_and_mul(order):
    rows, d, dtype = order["rows"], order["d"], order["dtype"]
    x = numbers(dtype, rows, 2 * d)
    out = torch.empty(rows, d, dtype=x.dtype, device="cuda")
    return None, lambda: flashinfer.activation.silu_and_mul(x, out=out)


def rope(order):
    rows, head_dim, dtype = order["rows"], order["head_dim"], order["dtype"]
    positions = torch.arange(rows, dtype=torch.int32, device="cuda")
    q = numbers(dtype, rows, order["qo_heads"], head_dim)
    k = numbers(dtype, rows, order["kv_heads"], head_dim)
    if not order["table"]:
        return None, lambda: flashinfer.rope.apply_rope_pos_ids_inplace(q, k, positions)
    angles = torch.arange(order["max_position"]).double()[:, None]
    angles = angles * 1e4 ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    table = torch.cat([angles.cos(), angles.sin()], dim=-1).float().cuda()
    q, k = q.view(rows, -1), k.view(rows, -1)
    return None, lambda: flashinfer.rope.apply_rope_with_cos_sin_cache_inplace(positions, q, k, head_dim, table)


def append(order):
    indptr, indices, last_page_len = pages_of(order)
    indptr, last_page_len = indptr.cuda(), last_page_len.cuda()
    cache, batch = cache_of(order), order["batch"]
    new = numbers(order["dtype"], batch, order["kv_heads"], order["head_dim"])
    requests = torch.arange(batch, dtype=torch.int32, device="cuda")
    positions = torch.full((batch,), order["tokens"] - 1, dtype=torch.int32, device="cuda")
    return None, lambda: flashinfer.page.append_paged_kv_cache(
        new, new, requests, positions, cache, indices, indptr, last_page_len
    )


def sampling(order):
    probs = probabilities(order["rows"], order["vocab"])
    return None, lambda: flashinfer.sampling.top_k_top_p_sampling_from_probs(
        probs, order["top_k"], order["top_p"], filter_apply_order="joint", seed=0, offset=0
    )


def decode(order):
    heads = order["qo_heads"], order["kv_heads"], order["head_dim"]
    dtype, (indptr, indices, last_page_len) = DTYPES[order["dtype"]], pages_of(order)
    cache = cache_of(order)
    q = numbers(order["dtype"], order["batch"], heads[0], heads[2])
    out = torch.empty_like(q)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=order["tensor_cores"]
    )

    def plan():
        wrapper.plan(
            indptr, indices, last_page_len, *heads, order["page_size"], q_data_type=dtype, kv_data_type=dtype
        )

    return plan, lambda: wrapper.run(q, cache, out=out)


def prefill(order):
    heads = order["qo_heads"], order["kv_heads"], order["head_dim"]
    dtype, (indptr, indices, last_page_len) = DTYPES[order["dtype"]], pages_of(order)
    cache = cache_of(order)
    qo_indptr = torch.arange(order["batch"] + 1, dtype=torch.int32) * order["queries"]
    q = numbers(order["dtype"], order["batch"] * order["queries"], heads[0], heads[2])
    out = torch.empty_like(q)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=order["backend"])

    def plan():
        wrapper.plan(
            qo_indptr, indptr, indices, last_page_len, *heads, order["page_size"],
            causal=True, q_data_type=dtype, kv_data_type=dtype,
        )  # fmt: skip

    return plan, lambda: wrapper.run(q, cache, out=out)


def mla(order):
    batch, heads, dtype = order["batch"], order["heads"], DTYPES[order["dtype"]]
    indptr, indices, _ = pages_of(order)
    pages = len(indices)
    ckv = numbers(order["dtype"], pages, order["page_size"], 512)
    kpe = numbers(order["dtype"], pages, order["page_size"], 64)
    q_nope, q_pe = numbers(order["dtype"], batch, heads, 512), numbers(order["dtype"], batch, heads, 64)
    out = torch.empty_like(q_nope)
    qo_indptr = torch.arange(batch + 1, dtype=torch.int32)
    lens = torch.full((batch,), order["tokens"], dtype=torch.int32)
    wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(workspace, backend=order["backend"])

    def plan():
        wrapper.plan(
            qo_indptr, indptr, indices, lens, heads, 512, 64, order["page_size"], False,
            order["sm_scale"], dtype, dtype,
        )  # fmt: skip

    return plan, lambda: wrapper.run(q_nope, q_pe, ckv, kpe, out=out)


OPS = {
    op.__name__: op
    for op in [rmsnorm, fused_add_rmsnorm, silu_and_mul, rope, append, sampling, decode, prefill, mla]
}
calls, graph, copies = {}, None, 1


def setup(order):
    global graph
    graph = None
    calls.clear()
    torch.cuda.empty_cache()
    plan, run = OPS[order["op"]](order)
    if plan:
        plan()
        calls["plan"] = plan
    calls["run"] = run
    run()
    torch.cuda.synchronize()
    return {}


def block(order):
    call, count = calls[order["what"]], order["calls"]
    for _ in range(order["warm"]):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return {"us": elapsed * 1e6 / count}


def capture(order):
    global graph, copies
    graph, copies = torch.cuda.CUDAGraph(), order["copies"]
    with torch.cuda.graph(graph):
        for _ in range(copies):
            calls["run"]()
    graph.replay()
    torch.cuda.synchronize()
    return {}


def replay(order):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return {"us": start.elapsed_time(end) * 1e3 / copies}


ORDERS = {function.__name__: function for function in [setup, block, capture, replay]}
say(python=sys.version.split()[0], torch=torch.__version__, flashinfer=flashinfer.__version__)
for line in sys.stdin:
    try:
        order = json.loads(line)
        say(**ORDERS[order["do"]](order))
    except Exception as error:
        say(error=f"{type(error).__name__}: {error}"[:300])
