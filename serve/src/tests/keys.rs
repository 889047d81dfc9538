//! Keys and tensors of files: all that change what is computed are used, or their
//! file is refused.

use std::fs;

use candle_core::quantized::gguf_file::Value;

use super::{Tiny, architectures};
use crate::model::{
    Config, Model,
    config::{Experts, Gating},
};

/// What a model that cannot be opened says.
#[track_caller]
fn refused(tiny: &Tiny, expected: &str) {
    let folder = tempfile::tempdir().unwrap();
    let problem = Model::open(&tiny.write(&folder)).expect_err("no model").to_string();
    assert!(problem.contains(expected), "{expected:?} is not in: {problem}");
}

#[track_caller]
fn config(tiny: &Tiny) -> Config {
    let folder = tempfile::tempdir().unwrap();
    Model::open(&tiny.write(&folder)).unwrap().config
}

fn with(pairs: &[(&'static str, Value)]) -> Tiny {
    let mut tiny = Tiny::new();
    tiny.metadata.extend(pairs.iter().cloned());
    tiny
}

/// Each of these changes what llama.cpp or transformers compute.
#[test]
fn keys_that_matter_are_used_or_refused() {
    for (key, value) in [
        ("llama.attention.causal", Value::Bool(false)),
        ("llama.attention.clamp_kqv", Value::F32(8.0)),
        ("llama.attention.max_alibi_bias", Value::F32(8.0)),
        ("llama.attention.temperature_scale", Value::F32(0.1)),
        ("llama.attention.kv_lora_rank", Value::U32(16)),
        ("llama.logit_scale", Value::F32(0.25)),
        ("llama.router_logit_softcapping", Value::F32(30.0)),
        ("llama.pooling_type", Value::U32(1)),
        ("llama.leading_dense_block_count", Value::U32(1)),
        ("llama.expert_group_count", Value::U32(4)),
        ("llama.nextn_predict_layers", Value::U32(1)),
        ("llama.embedding_length_per_layer_input", Value::U32(8)),
        ("llama.rope.dimension_sections", Value::Array(vec![Value::I32(8)])),
        ("llama.rope.scaling.alpha", Value::F32(1000.0)),
        ("llama.rope.scaling.yarn_ext_factor", Value::F32(0.0)),
        ("llama.rope.scaling.yarn_log_multiplier", Value::F32(0.1)),
        ("llama.rope.scaling.yarn_attn_factor", Value::F32(1.5)),
        ("llama.attention.key_length_swa", Value::U32(32)),
        ("llama.hidden_activation", Value::String("gelu".into())),
        ("llama.something_new", Value::U32(1)),
    ] {
        refused(&with(&[(key, value)]), key);
    }
    // The same keys where they ask for nothing.
    for (key, value) in [
        ("llama.attention.causal", Value::Bool(true)),
        ("llama.attention.clamp_kqv", Value::F32(0.0)),
        ("llama.logit_scale", Value::F32(1.0)),
        ("llama.expert_group_count", Value::U64(1)),
        ("llama.rope.scaling.yarn_ext_factor", Value::F32(1.0)),
        ("llama.rope.scaling.finetuned", Value::Bool(true)),
        ("llama.vocab_size", Value::U32(32)),
        ("other.key", Value::U32(1)),
    ] {
        config(&with(&[(key, value)]));
    }
    refused(&with(&[("general.type", Value::String("adapter".into()))]), "general.type is adapter");
    refused(&with(&[("general.architecture", Value::U32(1))]), "general.architecture is missing, or no text");
}

#[test]
fn keys_change_what_is_computed() {
    let read = |key: &'static str, value: Value| config(&with(&[(key, value)]));
    assert_eq!(read("llama.attention.sliding_window", Value::U32(6)).layers[0].window, Some(6));
    assert_eq!(read("llama.attention.sliding_window", Value::U32(0)).layers[0].window, None);
    assert_eq!(read("llama.attention.scale", Value::F32(0.25)).attention_scale, 0.25);
    assert_eq!(read("llama.attention.scale", Value::F32(0.0)).attention_scale, 0.125);
    assert_eq!(read("llama.attn_logit_softcapping", Value::F32(50.0)).attention_soft_cap, Some(50.0));
    assert_eq!(read("llama.final_logit_softcapping", Value::F32(30.0)).final_soft_cap, Some(30.0));
    assert_eq!(read("llama.embedding_scale", Value::F32(12.0)).embedding_scale, 12.0);
    assert_eq!(read("llama.residual_scale", Value::F32(0.5)).residual_scale, 0.5);
    let yarn = [
        ("llama.rope.scaling.type", Value::String("yarn".into())),
        ("llama.rope.scaling.factor", Value::F32(4.0)),
        ("llama.rope.scaling.yarn_attn_factor", Value::F32(1.5)),
    ];
    assert_eq!(config(&with(&yarn)).ropes[0].for_length(1).attention_factor(), 1.5);
}

/// The same number in all widths, and in an array with a number for each layer.
#[test]
fn integers_of_any_width_are_read() {
    let numbers = [
        Value::U8(1),
        Value::I8(1),
        Value::U16(1),
        Value::I16(1),
        Value::I32(1),
        Value::U64(1),
        Value::I64(1),
        Value::Array(vec![Value::I32(1)]),
    ];
    for number in numbers {
        assert_eq!(config(&with(&[("llama.attention.head_count", number)])).heads.num_qo_heads, 1);
    }
    let key = "llama.attention.head_count";
    for (number, expected) in [
        (Value::I32(-1), "llama.attention.head_count is -1; expected a number"),
        (Value::U64(1 << 40), "llama.attention.head_count is 1099511627776; expected a number"),
        (Value::F32(1.0), "llama.attention.head_count is 1; expected a number"),
        (
            Value::Array(vec![Value::I32(1), Value::I32(2)]),
            "llama.attention.head_count is an array of 2; expected the same number for all layers",
        ),
        (Value::Array(vec![]), "llama.attention.head_count is an array of 0"),
    ] {
        refused(&with(&[(key, number)]), expected);
    }
}

#[test]
fn experts_are_shared_as_the_file_says() {
    let experts = |pairs: &[(&'static str, Value)]| {
        let mut tiny = super::forward::EXPERTS.file();
        tiny.metadata.extend(pairs.iter().cloned());
        tiny
    };
    let read = |pairs: &[(&'static str, Value)]| config(&experts(pairs)).experts.unwrap();
    let plain =
        Experts { count: 8, used: 2, gating: Gating::Softmax, normalize: true, scale: 1.0, shared: None };
    assert_eq!(read(&[]), plain);
    let gating = |number| ("llama.expert_gating_func", Value::U32(number));
    assert_eq!(read(&[gating(2)]), Experts { gating: Gating::Sigmoid, ..plain });
    assert_eq!(
        read(&[("llama.expert_weights_norm", Value::Bool(false))]),
        Experts { normalize: false, ..plain }
    );
    assert_eq!(read(&[("llama.expert_weights_scale", Value::F32(2.5))]), Experts { scale: 2.5, ..plain });
    assert_eq!(read(&[("llama.expert_weights_scale", Value::F32(0.0))]), plain);
    refused(&experts(&[gating(4)]), "llama.expert_gating_func is 4; expected 1 (softmax)");
    refused(
        &experts(&[("llama.expert_shared_count", Value::U32(1))]),
        "expert_shared_count is 1; expected 0",
    );
    refused(&experts(&[("llama.expert_weights_norm", Value::U32(1))]), "expected true or false");
}

#[test]
fn more_tokens_than_rows_are_refused() {
    let tokens = |count: usize| {
        let tokens = (0..count).map(|token| Value::String(token.to_string()));
        with(&[("tokenizer.ggml.tokens", Value::Array(tokens.collect()))])
    };
    config(&tokens(32));
    refused(&tokens(33), "tokenizer.ggml.tokens has 33 tokens, and token_embd.weight 32 rows");
}

#[test]
fn windows_are_those_of_the_layers() {
    let windows = |name: &str| {
        let layers = architectures::load(name).model.config.layers;
        layers.iter().map(|layer| layer.window).collect::<Vec<_>>()
    };
    assert_eq!(windows("mistral"), [Some(6); 2]);
    assert_eq!(windows("qwen3"), [None; 2]);
    assert_eq!(windows("gemma2"), [Some(6), None]);
    assert_eq!(windows("gemma3"), [Some(6), Some(6), Some(6), Some(6), Some(6), None]);
    // A pattern of the file: a number, or a value for each layer.
    let pattern = |value| {
        let window = ("llama.attention.sliding_window", Value::U32(6));
        with(&[window, ("llama.attention.sliding_window_pattern", value)])
    };
    let of = |value| config(&pattern(value)).layers[0].window;
    assert_eq!(of(Value::U32(1)), None);
    assert_eq!(of(Value::U32(2)), Some(6));
    assert_eq!(of(Value::Array(vec![Value::Bool(false)])), None);
    assert_eq!(of(Value::Array(vec![Value::Bool(true)])), Some(6));
    refused(&pattern(Value::Array(vec![Value::Bool(true); 2])), "is an array of 2; expected true or false");
}

/// What overflows `f16` is computed in `bf16`, as is what a file holds in it.
#[test]
fn the_dtype_is_what_the_model_needs() {
    use flashinfer_rs::DType;
    for name in architectures::NAMES {
        let expected = if name.starts_with("gemma") { DType::BF16 } else { DType::F16 };
        assert_eq!(architectures::load(name).model.config.dtype, expected, "{name}");
    }
}

/// A missing or wrong tensor is found when the file is opened.
#[test]
fn tensors_are_checked_when_a_file_is_opened() {
    for architecture in architectures::NAMES {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let bytes = fs::read(architectures::path(architecture)).unwrap();
        // The name of each tensor of a layer in turn.
        let name = b"blk.1.";
        let places: Vec<_> = (0..bytes.len() - 8).filter(|&at| bytes[at..].starts_with(name)).collect();
        assert!(places.len() >= 6, "{architecture}: {}", places.len());
        for place in places {
            let mut bytes = bytes.clone();
            bytes[place + name.len()] = b'X';
            fs::write(&path, &bytes).unwrap();
            let problem = Model::open(&path).expect_err("no model").to_string();
            assert!(problem.contains("tensor blk.1."), "{architecture}: {problem}");
        }
    }
}
