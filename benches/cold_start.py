"""From the start of the process to the first result of decode, through FlashInfer's Python API.

Run by `cargo bench --bench cold_start`, which sets STARTED to the time at which it started this
process. Prints seconds: imports, CUDA context, first result, all.
"""

import os
import time

started = int(os.environ["STARTED"]) / 1e9
import torch
import flashinfer

imported = time.time()
torch.cuda.init()
torch.zeros(1, device="cuda")
torch.cuda.synchronize()
context = time.time()

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, PAGES = 32, 8, 128, 16, 64
workspace = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
cache = torch.zeros(PAGES, 2, PAGE_SIZE, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
q = torch.zeros(1, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
decode.plan(
    torch.tensor([0, PAGES], dtype=torch.int32),
    torch.arange(PAGES, dtype=torch.int32),
    torch.tensor([PAGE_SIZE], dtype=torch.int32),
    HEADS,
    KV_HEADS,
    HEAD_DIM,
    PAGE_SIZE,
    q_data_type=torch.bfloat16,
    kv_data_type=torch.bfloat16,
)
decode.run(q, cache).cpu()
done = time.time()
print(imported - started, context - imported, done - context, done - started)
