"""A GGUF file of a model's shape with random weights in f16, to measure speed with.

    python3 benches/random_gguf.py llama-3.1-8b MODEL.gguf --tokenizer SmolLM2-135M-Instruct.Q4_1.gguf

Vocabulary, merges and chat template are those of another GGUF file; tokens that it lacks are made up,
and no text has them. All layers have equal weights, each in a place of its own. Needs numpy and gguf.
"""

import argparse
import functools
import pathlib
import time

import gguf
import numpy as np
from shapes import SHAPES

TOKENS, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"


@functools.cache
def matrix(rows, columns):
    """As large as keeps products of normed rows near 1."""
    generator, bound = np.random.default_rng(rows + columns), (3 / columns) ** 0.5
    weights = np.empty((rows, columns), np.float16)
    for row in weights:
        row[:] = generator.uniform(-bound, bound, columns)
    return weights


def tensors(shape):
    """Names and values."""
    norm, kv = np.ones(shape.hidden, np.float32), shape.kv_heads * shape.head_dim
    yield "token_embd", matrix(shape.vocabulary, shape.hidden)
    yield "output_norm", norm
    if not shape.tied:
        yield "output", matrix(shape.vocabulary, shape.hidden)
    for layer in range(shape.layers):
        for name, value in {
            "attn_norm": norm,
            "attn_q": matrix(shape.hidden, shape.hidden),
            "attn_k": matrix(kv, shape.hidden),
            "attn_v": matrix(kv, shape.hidden),
            "attn_output": matrix(shape.hidden, shape.hidden),
            "ffn_norm": norm,
            "ffn_gate": matrix(shape.intermediate, shape.hidden),
            "ffn_up": matrix(shape.intermediate, shape.hidden),
            "ffn_down": matrix(shape.hidden, shape.intermediate),
        }.items():
            yield f"blk.{layer}.{name}", value


def keys(writer, shape):
    """What the file says of the model."""
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.rms_eps)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)


def tokenizer(writer, path, size):
    """The tokenizer of a file, with so many tokens."""
    fields = {
        name: field for name, field in gguf.GGUFReader(path).fields.items() if name.startswith("tokenizer.")
    }
    tokens = fields[TOKENS].contents()
    missing = size - len(tokens)
    if missing < 0:
        raise SystemExit(f"{path} has {len(tokens)} tokens, the model but {size}; expected at most as many")
    # As byte-level BPE writes words. No merge makes them.
    made_up = [f"Ġtoken{number}" for number in range(missing)]
    kinds = fields[TYPES].contents() + [int(gguf.TokenType.NORMAL)] * missing
    for name, field in fields.items():
        value = {TOKENS: tokens + made_up, TYPES: kinds}.get(name)
        kind, *element = field.types
        writer.add_key_value(name, field.contents() if value is None else value, kind, *element)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("path", type=pathlib.Path)
    parser.add_argument("--tokenizer", required=True, help="a GGUF file of which to take the tokenizer")
    args = parser.parse_args()
    begin, shape = time.monotonic(), SHAPES[args.shape]
    writer = gguf.GGUFWriter(args.path, "llama")
    writer.add_name(args.shape)
    keys(writer, shape)
    tokenizer(writer, args.tokenizer, shape.vocabulary)
    for name, value in tensors(shape):
        writer.add_tensor(f"{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{args.path}: {args.path.stat().st_size / 1e9:.2f} GB in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
