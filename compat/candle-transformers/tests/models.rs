//! Models of candle-transformers with flash attention on and off, over random
//! weights: logits of a prompt, of a second one that goes on from it, and of
//! tokens one by one.
//!
//! On the CPU that shows that the patched crate is what runs: candle's own flash
//! attention refuses CPU tensors. On an NVIDIA GPU (`FLASHINFER_RS_RUN_GPU_TESTS=1`)
//! the kernels run, on the stream that candle makes by default.

use std::{
    env,
    hash::{DefaultHasher, Hash, Hasher},
    io::Write,
};

use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::{Activation, Init, VarBuilder, var_builder::SimpleBackend};
use candle_transformers::models::{llama, mistral, qwen3};
use rand::{RngExt, SeedableRng, rngs::StdRng};

const HEAD_DIM: usize = 64;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HIDDEN: usize = HEADS * HEAD_DIM;
const INTERMEDIATE: usize = 160;
const VOCAB: usize = 97;
const LAYERS: usize = 2;
const POSITIONS: usize = 192;
/// Tokens of each step: two prompts, of which the second goes on from the first,
/// and then one at a time. With 128 and more, FlashAttention 3 may serve.
const STEPS: [usize; 7] = [131, 19, 1, 1, 1, 1, 1];

/// Computes the logits of the last of some tokens, `[batch, tokens]`, after so
/// many earlier ones.
type Forward = Box<dyn FnMut(&Tensor, usize) -> Result<Tensor>>;

/// Makes a model with flash attention or without.
type Model = fn(VarBuilder, bool) -> Result<Forward>;

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

/// Weights by their names: the same on every device, rounded to `dtype` and then
/// given in the element type that is asked for.
struct Random {
    seed: u64,
    dtype: DType,
}

impl SimpleBackend for Random {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        let mut hasher = DefaultHasher::new();
        (self.seed, name).hash(&mut hasher);
        let mut rng = StdRng::seed_from_u64(hasher.finish());
        // Matrices keep the size of what they multiply, norms nearly so.
        let (middle, width) = match shape.dims() {
            [_, input] if !name.contains("embed") => (0.0, (3.0 / *input as f32).sqrt()),
            [_, _] => (0.0, 1.0),
            _ => (1.0, 0.3),
        };
        let values = (0..shape.elem_count()).map(|_| middle + width * rng.random_range(-1.0..1.0));
        let values: Vec<f32> = values.collect();
        let rounded = Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(self.dtype)?;
        rounded.to_device(device)?.to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        candle_core::bail!("no shape for {name}")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        true
    }
}

/// What a model runs as.
#[derive(Clone, Copy)]
struct Run<'a> {
    device: &'a Device,
    dtype: DType,
    flash: bool,
    /// How many tokens it computes at a time.
    steps: &'a [usize],
}

/// One model's weights and tokens, for several runs.
struct Case {
    model: Model,
    seed: u64,
    batch: usize,
    /// What weights are rounded to.
    dtype: DType,
}

impl Case {
    fn new(model: Model, batch: usize, dtype: DType) -> Self {
        let seed = match env::var("FLASHINFER_RS_TEST_SEED") {
            Ok(seed) => seed.parse().expect("FLASHINFER_RS_TEST_SEED is a number"),
            Err(_) => rand::random(),
        };
        say(&format!("FLASHINFER_RS_TEST_SEED={seed}"));
        Self { model, seed, batch, dtype }
    }

    /// The logits of each step, `[batch · vocab]`, as `f32`.
    fn logits(&self, run: Run) -> Vec<Vec<f32>> {
        self.try_logits(run).unwrap()
    }

    fn try_logits(&self, Run { device, dtype, flash, steps }: Run) -> Result<Vec<Vec<f32>>> {
        let random = Random { seed: self.seed, dtype: self.dtype };
        let weights = VarBuilder::from_backend(Box::new(random), dtype, device.clone());
        let mut forward = (self.model)(weights, flash)?;
        let (mut rng, count) = (StdRng::seed_from_u64(self.seed), steps.iter().sum::<usize>());
        let tokens: Vec<_> = (0..self.batch * count).map(|_| rng.random_range(0..VOCAB as u32)).collect();
        let (tokens, mut before) = (Tensor::from_vec(tokens, (self.batch, count), device)?, 0);
        let step = |&len: &usize| {
            let logits = forward(&tokens.narrow(1, before, len)?.contiguous()?, before)?;
            before += len;
            logits.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
        };
        steps.iter().map(step).collect()
    }

    /// The logits in `f32` on the CPU, by candle's own operations.
    fn expected(&self) -> Vec<Vec<f32>> {
        self.logits(Run { device: &Device::Cpu, dtype: DType::F32, flash: false, steps: &STEPS })
    }
}

/// The largest relative error of any step.
fn error(logits: &[Vec<f32>], expected: &[Vec<f32>]) -> f32 {
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>().sqrt();
    let step = |(a, b): (&Vec<f32>, &Vec<f32>)| {
        assert_eq!(a.len(), b.len());
        let error = norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied());
        assert!(error.is_finite(), "{a:?}\n{b:?}");
        error
    };
    logits.iter().zip(expected).map(step).fold(0.0, f32::max)
}

/// On stderr past the capture of tests, as what was skipped must not be missed.
fn say(text: &str) {
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    let _ = std::io::stderr().write_all(format!("{name}: {text}\n").as_bytes());
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

fn cuda() -> Option<Device> {
    if env::var_os("FLASHINFER_RS_RUN_GPU_TESTS").is_none_or(|value| value != "1") {
        say("skipped: set FLASHINFER_RS_RUN_GPU_TESTS=1 on a machine with an NVIDIA GPU to run it");
        return None;
    }
    Some(Device::new_cuda(0).unwrap())
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
