"""Tiny models of every architecture, with random weights, as GGUF files, and
what Hugging Face transformers computes with them.

    pip install torch transformers gguf
    python make.py [NAME ...]

Each file has three keys of its own: `tiny.tokens`, `tiny.logits` of these tokens,
and `tiny.prefix_logits` of the first `PREFIX` of them alone, which are others
where the rotary embedding depends on a sequence's length.
"""

import math
import pathlib
import sys

import gguf
import torch
import transformers as hf

VOCAB, TOKENS, PREFIX = 64, 24, 12
HERE = pathlib.Path(__file__).parent

COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    attn_implementation="eager",
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1)


def rope(kind="default", theta=1e4, **more):
    return dict(rope_type=kind, rope_theta=theta, **more)


MODELS = {
    "llama": ("LLAMA", hf.LlamaConfig, dict(
        head_dim=16, attention_bias=True, mlp_bias=True,
        rope_parameters=rope("llama3", 500.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                             original_max_position_embeddings=32))),
    "mistral": ("LLAMA", hf.MistralConfig, dict(head_dim=24, sliding_window=6, rope_parameters=rope())),
    "mixtral": ("LLAMA", hf.MixtralConfig, dict(
        num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=None, rope_parameters=rope())),
    "qwen2": ("QWEN2", hf.Qwen2Config, dict(tie_word_embeddings=True, rope_parameters=rope())),
    "qwen3": ("QWEN3", hf.Qwen3Config, dict(
        head_dim=48, rope_parameters=rope("yarn", 1e3, factor=4.0, original_max_position_embeddings=16))),
    "gemma2": ("GEMMA2", hf.Gemma2Config, dict(
        hidden_size=16, head_dim=256, query_pre_attn_scalar=256, sliding_window=6, attn_logit_softcapping=3.0,
        final_logit_softcapping=5.0, tie_word_embeddings=True, rope_parameters=rope())),
    "gemma3": ("GEMMA3", hf.Gemma3TextConfig, dict(
        hidden_size=16, head_dim=128, query_pre_attn_scalar=128, sliding_window=6, num_hidden_layers=6,
        tie_word_embeddings=True, final_logit_softcapping=None,
        rope_parameters=dict(full_attention=rope("linear", 1e5, factor=8.0), sliding_attention=rope()))),
    "phi3": ("PHI3", hf.Phi3Config, dict(
        hidden_size=64, num_attention_heads=2, num_key_value_heads=1, sliding_window=10,
        original_max_position_embeddings=16,
        rope_parameters=rope("longrope", partial_rotary_factor=0.5, original_max_position_embeddings=16,
                             short_factor=[1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
                             long_factor=[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0]))),
    "qwen2moe": ("QWEN2MOE", hf.Qwen2MoeConfig, dict(
        shared_expert_intermediate_size=40, norm_topk_prob=False, rope_parameters=rope(), **EXPERTS)),
    "qwen3moe": ("QWEN3MOE", hf.Qwen3MoeConfig, dict(
        head_dim=16, norm_topk_prob=True, rope_parameters=rope(), **EXPERTS)),
}


def randomize(model, gemma):
    """Weights with which everything that a network computes shows in its logits."""
    generator = torch.Generator().manual_seed(len(model.config.model_type) * 100 + model.config.hidden_size)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            value = noise * 0.2 + (0 if gemma else 1)
        elif parameter.ndim == 1:
            value = noise * 0.5
        elif "embed" in name:
            value = noise * 0.7
        else:
            size = 6.0 if name.endswith(("mlp.gate.weight", "block_sparse_moe.gate.weight")) else 1.4
            value = noise * size / math.sqrt(parameter.shape[-1])
        # As the file holds it.
        parameter.data = value.half().float() if parameter.ndim > 1 else value


def permute(weight, heads):
    """Rows of each head in the order of GGUF's llama files: pairs side by side."""
    shape = weight.shape
    return weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def tensors(model, arch):
    """The tensors of a model by their names in GGUF files."""
    config = model.config
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)

    def named(name, tensor):
        stem, suffix = (name, ".weight")
        for end in (".weight", ".bias"):
            if name.endswith(end):
                stem, suffix = name.removesuffix(end), end
        found = names.get_name(stem)
        assert found, name
        return found + suffix, tensor

    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        if arch == gguf.MODEL_ARCH.LLAMA and ".q_proj." in name:
            tensor = permute(tensor, config.num_attention_heads)
        if arch == gguf.MODEL_ARCH.LLAMA and ".k_proj." in name:
            tensor = permute(tensor, config.num_key_value_heads)
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            for part, half in zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1)):
                yield named(stem + part, half)
        else:
            yield named(name, tensor)

    parameters = config.rope_parameters
    parameters = parameters.get("full_attention", parameters)
    if parameters["rope_type"] == "llama3":
        yield "rope_freqs.weight", llama3_factors(config, parameters)
    if parameters["rope_type"] == "longrope":
        yield "rope_factors_long.weight", torch.tensor(parameters["long_factor"])
        yield "rope_factors_short.weight", torch.tensor(parameters["short_factor"])


def llama3_factors(config, parameters):
    """What frequencies are divided by, from transformers' own computation."""
    plain = parameters["rope_theta"] ** (-torch.arange(0, config.head_dim, 2).double() / config.head_dim)
    scaled, _ = hf.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    return (plain / scaled.double()).float()


def keys(writer, config):
    """The keys that llama.cpp's converter writes for such a model."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    parameters = config.rope_parameters
    if local := parameters.get("sliding_attention"):
        writer.add_rope_freq_base_swa(local["rope_theta"])
    parameters = parameters.get("full_attention", parameters)
    writer.add_rope_freq_base(parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if part := parameters.get("partial_rotary_factor"):
        writer.add_rope_dimension_count(int(head_dim * part))
    kind = parameters["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(parameters["factor"])
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
    if kind == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        original = parameters["original_max_position_embeddings"]
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
    if cap := getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(cap)
    if cap := getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(cap)
    count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if count:
        writer.add_expert_count(count)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if width := getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(width)
    if width := getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(width)


def make(name):
    arch, config, options = MODELS[name]
    arch = gguf.MODEL_ARCH[arch]
    config = config(**{**COMMON, **options})
    model = hf.AutoModelForCausalLM.from_config(config).eval().float()
    randomize(model, config.model_type.startswith("gemma"))
    model.tie_weights()
    tokens = [(7 * at * at + 3 * at + 5) % VOCAB for at in range(TOKENS)]

    def logits(tokens):
        with torch.no_grad():
            return model(torch.tensor([tokens]), use_cache=False).logits[0].flatten().tolist()

    writer = gguf.GGUFWriter(HERE / f"{name}.gguf", gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type("model")
    keys(writer, config)
    writer.add_array("tiny.tokens", tokens)
    writer.add_array("tiny.logits", logits(tokens))
    writer.add_array("tiny.prefix_logits", logits(tokens[:PREFIX]))
    for tensor, value in tensors(model, arch):
        matrix = value.ndim > 1 and "norm" not in tensor
        value = value.squeeze(0) if tensor.endswith("gate_inp_shexp.weight") else value
        writer.add_tensor(tensor, (value.half() if matrix else value.float()).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


for name in sys.argv[1:] or MODELS:
    make(name)
