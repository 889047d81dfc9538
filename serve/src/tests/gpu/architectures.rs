//! Tiny models of every architecture on the GPU, against the CPU, which agrees with
//! Hugging Face transformers.

use candle_core::quantized::GgmlDType;
use flashinfer_rs::DType;

use super::*;
use crate::{
    backend::gpu::HeadWidths,
    model::{
        Config,
        config::Gating,
        weights::{Linear, Matrix},
    },
};

/// The largest difference of a row of logits, relative to its norm, in `bf16`. It has three
/// bits less than `f16`, in which these models are off by up to 1.3e-2.
const BF16_BOUND: f32 = 0.1;

macro_rules! tiny {
    ($name:literal) => {
        ($name, include_bytes!(concat!("../../../tests/data/tiny/", $name, ".gguf")).as_slice())
    };
}

/// A file among the tests' data.
type File = (&'static str, &'static [u8]);

const LLAMA: File = tiny!("llama");
const MISTRAL: File = tiny!("mistral");
const MIXTRAL: File = tiny!("mixtral");
const QWEN2: File = tiny!("qwen2");
const QWEN3: File = tiny!("qwen3");
const GEMMA2: File = tiny!("gemma2");
const GEMMA3: File = tiny!("gemma3");
const PHI3: File = tiny!("phi3");
const QWEN2_MOE: File = tiny!("qwen2moe");
const QWEN3_MOE: File = tiny!("qwen3moe");

fn open((name, bytes): File) -> Model {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(format!("{name}.gguf"));
    fs::write(&path, bytes).unwrap();
    Model::open(&path).unwrap()
}

/// A layer whose heads are filled up with zeros, which changes nothing: so that a small
/// model has heads as wide as the kernels that tests have.
pub fn widened(layer: Layer, widths: HeadWidths) -> Result<Layer> {
    let whole = |tensor, bias| -> Result<_> {
        Ok(Linear { parts: vec![Matrix::new(&tensor, GgmlDType::F32)?], bias })
    };
    let (qkv, output) = (&layer.qkv, &layer.attention_output);
    assert!(qkv.bias.is_none() && layer.qk_norm.is_none());
    Ok(Layer {
        qkv: whole(widths.pad_rows(&qkv.dequantize()?)?, None)?,
        attention_output: whole(widths.pad_columns(&output.dequantize()?)?, output.bias.clone())?,
        ..layer
    })
}

/// The same tokens on both, in a type; `head_dim` is what heads are widened to before.
fn check(file: File, dtype: DType, head_dim: Option<usize>, change: impl FnOnce(&mut Config)) {
    let model = open(file);
    let mut config = model.config.clone();
    change(&mut config);
    let tokens: Vec<_> = (0..FORCED as u32).map(|at| (7 * at * at + 3 * at + 5) % 64).collect();
    let pool = || PageAllocator::new(FORCED_PAGES, 4).unwrap();
    let (cpu_pool, gpu_pool) = (pool(), pool());
    let mut cpu = Cpu::new(&config, model.ends().unwrap(), model.layers(), &cpu_pool).unwrap();
    let mut gpu_config = Config { dtype, ..config.clone() };
    let widths = HeadWidths { model: config.head_dim, padded: head_dim.unwrap_or(config.head_dim) };
    gpu_config.head_dim = widths.padded;
    let layers = model.layers().map(|layer| match head_dim {
        Some(_) => widened(layer?, widths),
        None => layer,
    });
    let mut gpu =
        Gpu::new(&gpu_config, model.ends().unwrap(), layers, &gpu_pool, GpuOptions::new(FORCED_STEP))
            .unwrap();
    let (want, _) = force(&mut cpu, &cpu_pool, &tokens);
    let bound = if dtype == DType::F16 { LOGITS_BOUND } else { BF16_BOUND };
    // The second round replays the graphs of the first.
    for round in 0..2 {
        let (got, greedy) = force(&mut gpu, &gpu_pool, &tokens);
        check_rows(&format!("{} in {dtype}, round {round}", file.0), &got, &want, config.vocab_size, bound);
        for (row, &token) in got.chunks_exact(config.vocab_size).zip(&greedy) {
            assert_eq!(row[token as usize], row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }
}

/// Both types, which all of these have kernels for.
fn check_both(file: File) {
    let Some(_turn) = turn() else { return };
    for dtype in [DType::F16, DType::BF16] {
        check(file, dtype, None, |_| {});
    }
}

#[test]
fn llama_on_the_gpu_is_that_of_the_cpu() {
    check_both(LLAMA);
}

#[test]
fn mistral_with_a_window_on_the_gpu_is_that_of_the_cpu() {
    let Some(_turn) = turn() else { return };
    check(MISTRAL, DType::BF16, Some(128), |_| {});
}

#[test]
fn mixtral_on_the_gpu_is_that_of_the_cpu() {
    check_both(MIXTRAL);
}

#[test]
fn qwen2_on_the_gpu_is_that_of_the_cpu() {
    check_both(QWEN2);
}

#[test]
fn qwen3_on_the_gpu_is_that_of_the_cpu() {
    check_both(QWEN3);
}

#[test]
fn gemma2_on_the_gpu_is_that_of_the_cpu() {
    let Some(_turn) = turn() else { return };
    check(GEMMA2, DType::BF16, None, |_| {});
}

#[test]
fn gemma3_on_the_gpu_is_that_of_the_cpu() {
    let Some(_turn) = turn() else { return };
    check(GEMMA3, DType::BF16, None, |_| {});
}

#[test]
fn phi3_on_the_gpu_is_that_of_the_cpu() {
    let Some(_turn) = turn() else { return };
    check(PHI3, DType::BF16, Some(128), |_| {});
}

#[test]
fn qwen2moe_with_a_shared_expert_on_the_gpu_is_that_of_the_cpu() {
    check_both(QWEN2_MOE);
}

#[test]
fn qwen3moe_on_the_gpu_is_that_of_the_cpu() {
    check_both(QWEN3_MOE);
}

/// What no tiny model has.
#[test]
fn other_shares_of_experts_on_the_gpu_are_those_of_the_cpu() {
    let Some(_turn) = turn() else { return };
    for normalize in [false, true] {
        check(QWEN3_MOE, DType::F16, None, |config| {
            let experts = config.experts.as_mut().unwrap();
            (experts.gating, experts.normalize, experts.scale) = (Gating::Sigmoid, normalize, 1.5);
            config.residual_scale = 0.75;
            config.embedding_scale = 3.0;
        });
    }
}

/// Models choose what they are computed in.
#[test]
fn a_model_that_overflows_f16_is_computed_in_bf16() {
    for file in [GEMMA2, GEMMA3] {
        assert_eq!(open(file).config.dtype, DType::BF16, "{}", file.0);
    }
    for file in [LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, PHI3, QWEN2_MOE, QWEN3_MOE] {
        assert_eq!(open(file).config.dtype, DType::F16, "{}", file.0);
    }
}
