"""What PyTorch needs for a batch of requests, with no server above: one JSON line for each batch, as
`serving.py` has of servers.

    python3 benches/torch_batch.py llama-3.1-8b --batch 1 8 64 256

All requests of a batch begin together and are equally long, which is the best case. The model has
random weights in f16. Its layer is compiled (`torch.compile`); a step of decoding is one CUDA graph
over a static cache, and its tokens are copied to the host, where a server would need them. Needs
PyTorch and an NVIDIA GPU; without one it only compares decoding with reading all tokens at once.
"""

import argparse
import json
import time

import torch
import torch.nn.functional as F
from serving_load import summary
from shapes import SHAPES

REPETITIONS = 3


def rms_norm(hidden, weight, eps):
    return F.rms_norm(hidden.float(), hidden.shape[-1:], weight, eps).to(hidden.dtype)


def turned(heads, cos, sin):
    """Rotary embedding of [batch, heads, tokens, head_dim]."""
    first, second = heads.chunk(2, dim=-1)
    return (heads * cos + torch.cat((-second, first), dim=-1) * sin).to(heads.dtype)


def layer(hidden, weights, keys, values, positions, cos, sin, mask, shape):
    """A layer. Keys and values of the new tokens are written into the cache, [batch, heads, slots,
    head_dim]. Without a mask the new tokens are the first."""
    batch, tokens, _ = hidden.shape
    qkv = F.linear(rms_norm(hidden, weights["attention_norm"], shape.rms_eps), weights["qkv"])
    heads = qkv.view(batch, tokens, -1, shape.head_dim).transpose(1, 2)
    query, key, value = heads.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
    query, key = turned(query, cos, sin), turned(key, cos, sin)
    keys.index_copy_(2, positions, key)
    values.index_copy_(2, positions, value)
    if mask is None:
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    else:
        # One token: heads that share keys are rows of one product.
        query = query.reshape(batch, shape.kv_heads, -1, shape.head_dim)
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        attended = attended.view(batch, shape.heads, 1, shape.head_dim)
    attended = attended.transpose(1, 2).reshape(batch, tokens, -1)
    hidden = hidden + F.linear(attended, weights["attention_output"])
    normed = rms_norm(hidden, weights["mlp_norm"], shape.rms_eps)
    gate, up = F.linear(normed, weights["gate_up"]).chunk(2, dim=-1)
    return hidden + F.linear(F.silu(gate) * up, weights["down"])


class Model:
    """A model of the llama family with random weights."""

    def __init__(self, shape, device, dtype):
        def matrix(rows, columns):
            bound = (3 / columns) ** 0.5
            return torch.empty(rows, columns, dtype=dtype, device=device).uniform_(-bound, bound)

        kv, norm = shape.kv_heads * shape.head_dim, torch.ones(shape.hidden, device=device)
        self.shape, self.device, self.dtype, self.norm = shape, device, dtype, norm
        self.embedding = matrix(shape.vocabulary, shape.hidden)
        self.head = self.embedding if shape.tied else matrix(shape.vocabulary, shape.hidden)
        self.layers = [
            {
                "attention_norm": norm,
                "qkv": matrix(shape.hidden + 2 * kv, shape.hidden),
                "attention_output": matrix(shape.hidden, shape.hidden),
                "mlp_norm": norm,
                "gate_up": matrix(2 * shape.intermediate, shape.hidden),
                "down": matrix(shape.hidden, shape.intermediate),
            }
            for _ in range(shape.layers)
        ]
        exponents = torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim
        self.frequencies = shape.rope_base**-exponents

    def cache(self, batch, slots):
        """Keys and values of each layer."""
        size = (batch, self.shape.kv_heads, slots, self.shape.head_dim)
        return [[torch.zeros(size, dtype=self.dtype, device=self.device) for _ in "kv"] for _ in self.layers]

    def logits(self, tokens, positions, cache, layer=layer, decode=False):
        """Of the last tokens of [batch, tokens]."""
        angles = (positions[:, None] * self.frequencies).repeat(1, 2)
        cos, sin = angles.cos(), angles.sin()
        mask = torch.arange(cache[0][0].shape[2], device=self.device)[None, :] <= positions if decode else None
        hidden = F.embedding(tokens, self.embedding)
        for weights, (keys, values) in zip(self.layers, cache):
            hidden = layer(hidden, weights, keys, values, positions, cos, sin, mask, self.shape)
        return F.linear(rms_norm(hidden[:, -1], self.norm, self.shape.rms_eps), self.head)


class Batch:
    """Greedy answers to so many prompts, on the GPU."""

    def __init__(self, model, batch, prompt_tokens, answer_tokens):
        self.model, self.prompt_tokens, self.answer_tokens = model, prompt_tokens, answer_tokens
        self.prompts = torch.randint(model.shape.vocabulary, (batch, prompt_tokens), device=model.device)
        # Aligned, as kernels that take masks want it.
        self.cache = model.cache(batch, -(-(prompt_tokens + answer_tokens) // 64) * 64)
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
        self.position = torch.zeros(1, dtype=torch.long, device=model.device)
        compiled = torch.compile(layer, fullgraph=True, dynamic=False)
        self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step(compiled)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self.graph):
            self.step(compiled)

    def step(self, layer):
        logits = self.model.logits(self.tokens, self.position, self.cache, layer, decode=True)
        self.tokens.copy_(logits.argmax(-1, keepdim=True))
        self.position += 1

    def answers(self):
        """The times at which each token of the answers was on the host, after that of the start."""
        times = [time.perf_counter()]
        positions = torch.arange(self.prompt_tokens, device=self.model.device)
        self.tokens.copy_(self.model.logits(self.prompts, positions, self.cache).argmax(-1, keepdim=True))
        self.position.fill_(self.prompt_tokens)
        for left in reversed(range(self.answer_tokens)):
            self.tokens.cpu()
            times.append(time.perf_counter())
            if left:
                self.graph.replay()
        return times


def measure(model, batch, prompt_tokens, answer_tokens):
    """A row, as of servers."""
    answers = Batch(model, batch, prompt_tokens, answer_tokens)
    answers.answers()  # Does not count.
    runs = [answers.answers() for _ in range(REPETITIONS)]
    took = sum(times[-1] - times[0] for times in runs)
    requests = batch * REPETITIONS
    return {
        "clients": batch,
        "requests": requests,
        "seconds": took,
        "prompt_tokens": prompt_tokens,
        "answer_tokens": answer_tokens,
        "requests_per_second": requests / took,
        "tokens_per_second": requests * answer_tokens / took,
        "time_to_first_token_ms": summary([times[1] - times[0] for times in runs]),
        "inter_token_latency_ms": summary([b - a for times in runs for a, b in zip(times[1:], times[2:])]),
        "request_ms": summary([times[-1] - times[0] for times in runs]),
    }


def check(shape):
    """Whether decoding a token computes what reading it with all before it does."""
    model = Model(shape, "cpu", torch.float32)
    tokens = torch.randint(shape.vocabulary, (2, 9))
    expected = model.logits(tokens, torch.arange(9), model.cache(2, 16))
    cache = model.cache(2, 16)
    model.logits(tokens[:, :8], torch.arange(8), cache)
    torch.testing.assert_close(model.logits(tokens[:, 8:], torch.tensor([8]), cache, decode=True), expected)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--answer-tokens", type=int, default=110)
    args = parser.parse_args()
    with torch.no_grad():
        if not torch.cuda.is_available():
            check(SHAPES[args.shape])
            raise SystemExit("There is no GPU to measure. On the CPU, decoding agrees with reading.")
        model = Model(SHAPES[args.shape], "cuda", torch.float16)
        for batch in args.batch:
            print(json.dumps(measure(model, batch, args.prompt_tokens, args.answer_tokens)), flush=True)


if __name__ == "__main__":
    main()
