"""Host time to enqueue FlashInfer's kernels through its Python API.

Called by the benchmark of the same name, with the same counts; prints one
tab-separated line for each case.
"""

import statistics
import sys
import time

import torch

import flashinfer

CALLS, REPETITIONS, WARM_UP = (int(argument) for argument in sys.argv[1:4])
QO_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 16
FFN, MAX_POSITION, VOCAB = 14336, 4096, 32000
DECODE_CASES = [(1, 1024), (1, 32768), (64, 1024)]


def host_time(name, call):
    times = []
    for repetition in range(WARM_UP + REPETITIONS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        elapsed = (time.perf_counter() - start) * 1e6 / CALLS
        if repetition >= WARM_UP:
            times.append(elapsed)
    torch.cuda.synchronize()
    print("result", name, f"{statistics.median(times):.4f}", sep="\t", flush=True)


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.bfloat16, device="cuda")


def main():
    x, weight, out = zeros(1, 4096), zeros(4096), zeros(1, 4096)
    try:
        host_time("rmsnorm 1x4096", lambda: flashinfer.norm.rmsnorm(x, weight, 1e-6, out=out))
    except Exception as error:  # its default norm needs packages beyond the modules
        print(f"rmsnorm is not measured: {error}", file=sys.stderr)

    gate_up, gated = zeros(1, 2 * FFN), zeros(1, FFN)
    host_time("silu_and_mul", lambda: flashinfer.activation.silu_and_mul(gate_up, out=gated))
    table = torch.zeros(MAX_POSITION, HEAD_DIM, device="cuda")
    positions = torch.tensor([7], dtype=torch.int32, device="cuda")
    q, k = zeros(1, QO_HEADS * HEAD_DIM), zeros(1, KV_HEADS * HEAD_DIM)
    host_time(
        "rope in place",
        lambda: flashinfer.rope.apply_rope_with_cos_sin_cache_inplace(positions, q, k, HEAD_DIM, table),
    )
    probs = torch.full((1, VOCAB), 1 / VOCAB, device="cuda")
    host_time(
        "top_p_sampling", lambda: flashinfer.sampling.top_p_sampling_from_probs(probs, 0.9, seed=0, offset=0)
    )

    scratch = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
    for batch, tokens in DECODE_CASES:
        pages = tokens // PAGE_SIZE
        indptr = torch.arange(batch + 1, dtype=torch.int32) * pages
        indices = torch.arange(batch * pages, dtype=torch.int32, device="cuda")
        last_page_len = torch.full((batch,), PAGE_SIZE, dtype=torch.int32)
        k = zeros(batch * pages, PAGE_SIZE, KV_HEADS, HEAD_DIM)
        v, q, out = torch.zeros_like(k), zeros(batch, QO_HEADS, HEAD_DIM), zeros(batch, QO_HEADS, HEAD_DIM)
        name = f"b{batch} L{tokens}"

        if batch == 64:
            new = zeros(batch, KV_HEADS, HEAD_DIM)
            rows = torch.arange(batch, dtype=torch.int32, device="cuda")
            positions = torch.full((batch,), tokens - 1, dtype=torch.int32, device="cuda")
            device_indptr, device_last = indptr.cuda(), last_page_len.cuda()
            host_time(
                "append 64 tokens",
                lambda: flashinfer.page.append_paged_kv_cache(
                    new, new, rows, positions, (k, v), indices, device_indptr, device_last
                ),
            )

        for use_tensor_cores, cores in [(False, "CUDA"), (True, "tensor")]:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                scratch, "NHD", use_tensor_cores=use_tensor_cores
            )

            def plan():
                wrapper.plan(
                    indptr, indices, last_page_len, QO_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE,
                    q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
                )

            host_time(f"decode.plan {name}, {cores} cores", plan)
            host_time(f"decode.run {name}, {cores} cores", lambda: wrapper.run(q, (k, v), out=out))


main()
