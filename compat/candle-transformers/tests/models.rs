//! Models of candle-transformers with flash attention on and off, over random
//! weights: logits of a prompt, of a second one that goes on from it, and of
//! tokens one by one.
//!
//! On the CPU that shows that the patched crate is what runs: candle's own flash
//! attention refuses CPU tensors. On an NVIDIA GPU (`FLASHINFER_RS_RUN_GPU_TESTS=1`)
//! the kernels run, on the stream that candle makes by default.

mod common;

use candle_core::{DType, Device, Result};
use candle_nn::{Activation, VarBuilder};
use candle_transformers::models::{llama, mistral, qwen3};
use common::{Case, Forward, Model, Run, STEPS, VOCAB, cuda, error, say};

const HEAD_DIM: usize = 64;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HIDDEN: usize = HEADS * HEAD_DIM;
const INTERMEDIATE: usize = 160;
const LAYERS: usize = 2;
const POSITIONS: usize = 192;

fn llama(weights: VarBuilder, flash: bool) -> Result<Forward> {
    let config = llama::Config {
        hidden_size: HIDDEN,
        intermediate_size: INTERMEDIATE,
        vocab_size: VOCAB,
        num_hidden_layers: LAYERS,
        num_attention_heads: HEADS,
        num_key_value_heads: KV_HEADS,
        use_flash_attn: flash,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        bos_token_id: None,
        eos_token_id: None,
        rope_scaling: None,
        max_position_embeddings: POSITIONS,
        tie_word_embeddings: true,
    };
    let mut cache = llama::Cache::new(true, weights.dtype(), &config, weights.device())?;
    let model = llama::Llama::load(weights, &config)?;
    Ok(Box::new(move |tokens, before| model.forward(tokens, before, &mut cache)))
}

fn mistral(weights: VarBuilder, flash: bool) -> Result<Forward> {
    let config = mistral::Config {
        vocab_size: VOCAB,
        hidden_size: HIDDEN,
        intermediate_size: INTERMEDIATE,
        num_hidden_layers: LAYERS,
        num_attention_heads: HEADS,
        head_dim: Some(HEAD_DIM),
        num_key_value_heads: KV_HEADS,
        hidden_act: Activation::Silu,
        max_position_embeddings: POSITIONS,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        sliding_window: None,
        use_flash_attn: flash,
    };
    let mut model = mistral::Model::new(&config, weights)?;
    Ok(Box::new(move |tokens, before| model.forward(tokens, before)))
}

/// This one has no switch: it takes flash attention on CUDA, and never on the CPU.
fn qwen3(weights: VarBuilder, _: bool) -> Result<Forward> {
    let config = qwen3::Config {
        vocab_size: VOCAB,
        hidden_size: HIDDEN,
        intermediate_size: INTERMEDIATE,
        num_hidden_layers: LAYERS,
        num_attention_heads: HEADS,
        head_dim: HEAD_DIM,
        attention_bias: false,
        num_key_value_heads: KV_HEADS,
        max_position_embeddings: POSITIONS,
        sliding_window: None,
        max_window_layers: 0,
        tie_word_embeddings: false,
        rope_theta: 1e4,
        rms_norm_eps: 1e-6,
        use_sliding_window: false,
        hidden_act: Activation::Silu,
    };
    let mut model = qwen3::ModelForCausalLM::new(&config, weights)?;
    Ok(Box::new(move |tokens, before| model.forward(tokens, before)))
}

#[test]
fn flash_and_eager_agree_on_the_cpu() {
    // Rounding of activations in `f16` alone makes 1e-3.
    for (dtype, bound) in [(DType::F32, 5e-6), (DType::F16, 5e-3)] {
        for (name, model) in [("llama", llama as Model), ("mistral", mistral)] {
            for batch in [1, 2] {
                let case = Case::new(model, batch, dtype);
                let run = Run { device: &Device::Cpu, dtype, flash: true, steps: &STEPS };
                let error = error(&case.logits(run), &case.expected());
                say(&format!("{name} {dtype:?} batch {batch}: relative error {error:.1e}"));
                assert!(error < bound);
            }
        }
    }
}

/// It has an attention of its own on the CPU, so that this checks no more than what
/// the test on CUDA compares with.
#[test]
fn qwen3_decodes_on_the_cpu_what_it_reads_at_once() {
    let case = Case::new(qwen3, 2, DType::F32);
    let expected = case.expected();
    let steps = &[STEPS.iter().sum()];
    let at_once = case.logits(Run { device: &Device::Cpu, dtype: DType::F32, flash: true, steps });
    assert!(error(&at_once, &expected[STEPS.len() - 1..]) < 5e-6);
}

#[test]
fn flash_is_as_near_as_eager_on_cuda() {
    let Some(device) = &cuda() else { return };
    for (dtype, bound) in [(DType::F16, 5e-3), (DType::BF16, 4e-2)] {
        for (name, model) in [("llama", llama as Model), ("mistral", mistral), ("qwen3", qwen3)] {
            for batch in [1, 2] {
                let case = Case::new(model, batch, dtype);
                let expected = case.expected();
                let run = |flash| case.logits(Run { device, dtype, flash, steps: &STEPS });
                let (eager, flash) = (error(&run(false), &expected), error(&run(true), &expected));
                say(&format!(
                    "{name} {dtype:?} batch {batch}: relative error {flash:.1e}, of eager {eager:.1e}"
                ));
                assert!(flash < bound && flash < 2.0 * eager);
            }
        }
    }
}

#[test]
fn f32_on_cuda_is_refused_with_the_types_that_are_not() {
    let Some(device) = &cuda() else { return };
    let case = Case::new(llama, 1, DType::F32);
    let error = case
        .try_logits(Run { device, dtype: DType::F32, flash: true, steps: &STEPS })
        .unwrap_err()
        .to_string();
    assert!(error.contains("f32") && error.contains("f16") && error.contains("bf16"), "{error}");
}
