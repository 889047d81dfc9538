"""Time of a decode step in Hugging Face transformers, to stand beside this crate's.

    python3 benches/hf_transformers.py SmolLM2-135M-Instruct.Q4_1.gguf

The model `smollm2` of the program `flashinfer`, with the same weights in f16, at
contexts of 112 to 144 tokens: eager with the default cache, and compiled with a
static cache. The next token is chosen on the device and stays there. Needs
PyTorch, transformers and an NVIDIA GPU; without a GPU it checks the weights
only, by what the model says. Prints one JSON line for each measurement, and a
table at the end.
"""

import argparse
import gc
import json
import signal
import statistics
import struct
import time

import numpy as np

# What the GGUF file must say of itself.
MODEL = {
    "general.architecture": "llama",
    "llama.block_count": 30,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.rope.freq_base": 100000.0,
}
VOCAB, EPS, HEAD_DIM = 49152, 1e-5, 64

# "The capital of France is", and what greedy decoding adds.
PROMPT = [504, 3575, 282, 4649, 314]
ANSWER = [7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33, 40, 29, 32, 33]

# The two for which there is a target come first, should time run out.
BATCHES = [1, 64, 8, 256]
PREFILL, WARM_UP, STEPS, REPETITIONS = 104, 8, 32, 5
CACHE = max(PREFILL + WARM_UP + STEPS, len(PROMPT) + len(ANSWER))


def q4_1(blocks):
    scale, least = (blocks[:, at : at + 2].view(np.float16).astype(np.float32) for at in (0, 2))
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return nibbles * scale + least


def q8_0(blocks):
    return blocks[:, 2:].view(np.int8) * blocks[:, :2].view(np.float16).astype(np.float32)


# Elements and bytes of a block, and what makes f32 of blocks, by GGUF's type number.
TYPES = {0: (1, 4, lambda blocks: blocks.view(np.float32)), 3: (32, 20, q4_1), 8: (32, 34, q8_0)}
# struct's letter of each type of metadata; 8 is a string, 9 an array.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def read_gguf(path):
    """The metadata of a file, and its tensors as f32 arrays, by name."""
    data, at = np.fromfile(path, np.uint8), 4

    def number(letter):
        nonlocal at
        (value,) = struct.unpack_from("<" + letter, data, at)
        at += struct.calcsize("<" + letter)
        return value

    def string():
        nonlocal at
        length = number("Q")
        at += length
        return data[at - length : at].tobytes().decode()

    def value(kind):
        if kind == 8:
            return string()
        if kind == 9:
            kind = number("I")
            return [value(kind) for _ in range(number("Q"))]
        return number(NUMBERS[kind])

    if data[:4].tobytes() != b"GGUF" or number("I") not in (2, 3):
        raise SystemExit(f"{path} is no GGUF file of version 2 or 3")
    count, metadata, infos = number("Q"), {}, []
    for _ in range(number("Q")):
        name = string()
        metadata[name] = value(number("I"))
    for _ in range(count):
        name = string()
        shape = [number("Q") for _ in range(number("I"))][::-1]
        infos.append((name, shape, number("I"), number("Q")))
    alignment = metadata.get("general.alignment", 32)
    start = -(-at // alignment) * alignment

    tensors = {}
    for name, shape, kind, offset in infos:
        elements, size, dequantize = TYPES[kind]
        blocks = int(np.prod(shape)) // elements
        raw = data[start + offset : start + offset + blocks * size].reshape(blocks, size)
        tensors[name] = dequantize(raw).reshape(shape)
    return metadata, tensors


def halves(rows, heads):
    """GGUF has the rows that rope turns together side by side; transformers has
    the first of all pairs, then the second."""
    pairs = rows.reshape(heads, HEAD_DIM // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def weights(path):
    """The model's weights, under the names of transformers."""
    metadata, tensors = read_gguf(path)
    for key, expected in MODEL.items():
        if metadata.get(key) != expected:
            raise SystemExit(f"{path} is not SmolLM2-135M: {key} is {metadata.get(key)}, not {expected}")
    names = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    state = {
        "model.embed_tokens.weight": tensors["token_embd.weight"],
        "lm_head.weight": tensors["token_embd.weight"],
        "model.norm.weight": tensors["output_norm.weight"],
    }
    heads = {"attn_q": MODEL["llama.attention.head_count"], "attn_k": MODEL["llama.attention.head_count_kv"]}
    for layer in range(MODEL["llama.block_count"]):
        for ours, theirs in names.items():
            tensor = tensors[f"blk.{layer}.{ours}.weight"]
            if ours in heads:
                tensor = halves(tensor, heads[ours])
            state[f"model.layers.{layer}.{theirs}.weight"] = tensor
    return state


def load(path, device, dtype):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=MODEL["llama.embedding_length"],
        intermediate_size=MODEL["llama.feed_forward_length"],
        num_hidden_layers=MODEL["llama.block_count"],
        num_attention_heads=MODEL["llama.attention.head_count"],
        num_key_value_heads=MODEL["llama.attention.head_count_kv"],
        head_dim=HEAD_DIM,
        max_position_embeddings=8192,
        rms_norm_eps=EPS,
        rope_theta=MODEL["llama.rope.freq_base"],
        tie_word_embeddings=True,
    )
    # Not `model.half()`, which would round the frequencies of rope, too.
    torch.set_default_dtype(dtype)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in weights(path).items()})
    model = model.to(device).eval()
    frequencies = MODEL["llama.rope.freq_base"] ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq.cpu(), frequencies)
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


class Decoder:
    """Greedy decoding by one way of running the model."""

    def __init__(self, model, static, compiler=None):
        self.model, self.static = model, static
        self.step = compiler(self.next) if compiler else self.next
        self.cache = None

    def next(self, tokens, cache):
        output = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].argmax(-1, keepdim=True)

    def prefill(self, prompts):
        """Begins anew; the first tokens of the answers."""
        from transformers import DynamicCache, StaticCache

        if not self.static:
            self.cache = DynamicCache(config=self.model.config)
        elif self.cache is None:
            self.cache = StaticCache(config=self.model.config, max_cache_len=CACHE)
        else:
            self.cache.reset()
        return self.next(prompts, self.cache)

    def decode(self, tokens, steps):
        """The tokens of each step. They are copied, as a graph's next replay overwrites its output."""
        answer = []
        for _ in range(steps):
            tokens = self.step(tokens, self.cache).clone()
            answer.append(tokens)
        return answer

    def says_what_it_should(self, prompts):
        tokens = self.prefill(prompts)
        answer = [tokens] + self.decode(tokens, len(ANSWER) - 1)
        ids = [[int(token) for token in row] for row in zip(*(tokens.flatten() for tokens in answer))]
        return all(row == ANSWER for row in ids)

    def milliseconds(self, batch):
        import torch

        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(17, VOCAB, (batch, PREFILL), generator=generator).to(self.model.device)
        times = []
        for _ in range(REPETITIONS):
            tokens = self.decode(self.prefill(prompts), WARM_UP)[-1]
            torch.cuda.synchronize()
            start = time.perf_counter()
            self.decode(tokens, STEPS)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - start) / STEPS * 1e3)
        return statistics.median(times)


def measure(name, decoder, batch, deadline):
    import torch
    from torch._dynamo.utils import counters

    counters.clear()
    prompts = torch.tensor([PROMPT] * batch, device=decoder.model.device)
    result = {"engine": name, "batch": batch}
    try:
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("no time was left")
        signal.setitimer(signal.ITIMER_REAL, seconds)
        result["ids_agree"] = decoder.says_what_it_should(prompts)
        result["ms_per_step"] = round(decoder.milliseconds(batch), 4)
        result["tokens_per_second"] = round(batch / result["ms_per_step"] * 1e3, 1)
        # A step that was not captured as one graph would not be the best that there is.
        result["graph_breaks"] = sum(counters["graph_break"].values())
        result["cudagraph_skips"] = counters["inductor"]["cudagraph_skips"]
    except Exception as error:  # the other measurements go on
        result["error"] = f"{type(error).__name__}: {error}"[:500]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    print(json.dumps(result), flush=True)
    return result


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("gguf")
    arguments.add_argument("--seconds", type=float, default=230, help="what is not measured by then is left out")
    arguments.add_argument("--batch", type=int, nargs="+", default=BATCHES, help="sizes, in this order")
    arguments.add_argument("--compiled", action="store_true", help="leave the eager steps out")
    arguments = arguments.parse_args()
    started = time.monotonic()

    import torch
    import transformers

    if not torch.cuda.is_available():
        decoder = Decoder(load(arguments.gguf, "cpu", torch.float32), static=False)
        with torch.no_grad():
            agrees = decoder.says_what_it_should(torch.tensor([PROMPT] * 2))
        raise SystemExit(f"There is no GPU to measure. On the CPU the ids {'agree' if agrees else 'DIFFER'}.")

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}")
    model = load(arguments.gguf, "cuda", torch.float16)

    def compiler(function):
        return torch.compile(function, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def out_of_time(*_):
        raise TimeoutError("its time ran out")

    signal.signal(signal.SIGALRM, out_of_time)
    results = []
    ways = [
        ("transformers, eager, dynamic cache", False, None),
        ("transformers, compiled, static cache", True, compiler),
    ]
    with torch.no_grad():
        for name, static, compiled in ways[arguments.compiled :]:
            for batch in arguments.batch:
                # What belongs to other sizes is dropped, so that each is compiled for itself.
                torch._dynamo.reset()
                gc.collect()
                torch.cuda.empty_cache()
                decoder = Decoder(model, static, compiled)
                results.append(measure(name, decoder, batch, started + arguments.seconds))
                del decoder

    print(f"\nafter {time.monotonic() - started:.0f} s:\n")
    print("| engine | batch | ms per step | tokens per second | ids |\n|---|---|---|---|---|")
    for result in sorted(results, key=lambda result: (result["engine"], result["batch"])):
        ids = {True: "agree", False: "DIFFER", None: "–"}[result.get("ids_agree")]
        time_and_rate = f"{result.get('ms_per_step', '–')} | {result.get('tokens_per_second', '–')}"
        print(f"| {result['engine']} | {result['batch']} | {time_and_rate} | {ids} |")
    if not all(result.get("ids_agree") and "error" not in result for result in results):
        raise SystemExit("Not everything was measured, or the ids differ; see the JSON lines.")


if __name__ == "__main__":
    main()
