"""A model file that is small: tokens for bytes and for pairs of letters, a template with tools, and
weights of zeros. The stand-in, which computes no model, takes its vocabulary."""

import itertools
import string

import gguf
import numpy as np
from server import ROOT

TEMPLATE = ROOT / "serve" / "tests" / "data" / "templates" / "qwen2.5.jinja"
CONTROL = ["<|im_start|>", "<tool_call>", "</tool_call>"]
END = "<|im_end|>"
CONTEXT, WIDTH, HEADS, LAYERS = 8192, 32, 2, 1


def byte_tokens():
    """How byte-level BPE writes each byte: as itself if it can be printed, else as a character from 256 on."""
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = itertools.count(256)
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]


def write(path, ends=True, template=None):
    """Writes the file. Without a token that ends answers, only their length does. The template is that of
    Qwen 2.5, if no other is given."""
    pairs = list(itertools.product(string.ascii_lowercase, repeat=2))
    texts, control = byte_tokens() + ["".join(pair) for pair in pairs], CONTROL + [END] * ends
    tokens = texts + control
    kinds = [gguf.TokenType.NORMAL] * len(texts) + [gguf.TokenType.CONTROL] * len(control)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in pairs])
    if ends:
        writer.add_eos_token_id(tokens.index(END))
    writer.add_add_bos_token(False)
    writer.add_chat_template(template or TEMPLATE.read_text())
    square, norm = np.zeros((WIDTH, WIDTH), np.float32), np.ones(WIDTH, np.float32)
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", square)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", norm)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), WIDTH), np.float32))
    writer.add_tensor("output_norm.weight", norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
