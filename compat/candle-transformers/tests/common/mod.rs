//! What tests of models share: random weights and tokens, runs over them, and how far two are apart.

// Each test file uses its own part of this.
#![allow(dead_code)]

use std::{
    env,
    hash::{DefaultHasher, Hash, Hasher},
    io::Write,
};

use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};
use rand::{RngExt, SeedableRng, rngs::StdRng};

pub const VOCAB: usize = 97;
/// Tokens of each step: two prompts, of which the second goes on from the first,
/// and then one at a time. With 128 and more, FlashAttention 3 may serve.
pub const STEPS: [usize; 7] = [131, 19, 1, 1, 1, 1, 1];

/// Computes the logits of the last of some tokens, `[batch, tokens]`, after so
/// many earlier ones.
pub type Forward = Box<dyn FnMut(&Tensor, usize) -> Result<Tensor>>;

/// Makes a model with flash attention or without.
pub type Model = fn(VarBuilder, bool) -> Result<Forward>;

/// Weights by their names: the same on every device, rounded to `dtype` and then
/// given in the element type that is asked for.
pub struct Random {
    pub seed: u64,
    pub dtype: DType,
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
pub struct Run<'a> {
    pub device: &'a Device,
    pub dtype: DType,
    pub flash: bool,
    /// How many tokens it computes at a time.
    pub steps: &'a [usize],
}

/// One model's weights and tokens, for several runs.
pub struct Case {
    pub model: Model,
    pub seed: u64,
    pub batch: usize,
    /// What weights are rounded to.
    pub dtype: DType,
}

impl Case {
    pub fn new(model: Model, batch: usize, dtype: DType) -> Self {
        let seed = match env::var("FLASHINFER_RS_TEST_SEED") {
            Ok(seed) => seed.parse().expect("FLASHINFER_RS_TEST_SEED is a number"),
            Err(_) => rand::random(),
        };
        say(&format!("FLASHINFER_RS_TEST_SEED={seed}"));
        Self { model, seed, batch, dtype }
    }

    /// The logits of each step, `[batch · vocab]`, as `f32`.
    pub fn logits(&self, run: Run) -> Vec<Vec<f32>> {
        self.try_logits(run).unwrap()
    }

    pub fn try_logits(&self, Run { device, dtype, flash, steps }: Run) -> Result<Vec<Vec<f32>>> {
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
    pub fn expected(&self) -> Vec<Vec<f32>> {
        self.logits(Run { device: &Device::Cpu, dtype: DType::F32, flash: false, steps: &STEPS })
    }
}

/// The largest relative error of any step.
pub fn error(logits: &[Vec<f32>], expected: &[Vec<f32>]) -> f32 {
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
pub fn say(text: &str) {
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    let _ = std::io::stderr().write_all(format!("{name}: {text}\n").as_bytes());
}

pub fn cuda() -> Option<Device> {
    if env::var_os("FLASHINFER_RS_RUN_GPU_TESTS").is_none_or(|value| value != "1") {
        say("skipped: set FLASHINFER_RS_RUN_GPU_TESTS=1 on a machine with an NVIDIA GPU to run it");
        return None;
    }
    Some(Device::new_cuda(0).unwrap())
}
