//! A model of a known shape with random weights, to measure.

use std::iter;

use candle_core::quantized::GgmlDType;
use clap::ValueEnum;
use flashinfer_rs::{
    DType,
    attention::Heads,
    rope::{RopeFrequencies, RopeScaling},
};
use half::f16;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use rayon::prelude::*;

use super::{
    architecture::{Activation, Architecture},
    config::{Biases, Config, LayerConfig},
    rope::Rope,
    shard::VocabPart,
    weights::{Ends, Layer, LayerMlp, Linear, Matrix, Mlp},
};
use crate::Result;

/// Shapes by name.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Shape {
    /// Llama 3 8B
    #[value(name = "llama-8b")]
    Llama8b,
    /// Llama 3 70B
    #[value(name = "llama-70b")]
    Llama70b,
}

impl Shape {
    pub fn config(self) -> Result<Config> {
        let [layers, hidden_size, qo, intermediate_size] = match self {
            Self::Llama8b => [32, 4096, 32, 14_336],
            Self::Llama70b => [80, 8192, 64, 28_672],
        };
        let head_dim = 128;
        let rope = RopeFrequencies::new(head_dim, 5e5, &RopeScaling::None)?;
        Ok(Config {
            architecture: Architecture::of("llama").ok_or("there is no architecture llama")?,
            dtype: DType::F16,
            hidden_size,
            vocab_size: 128_256,
            context_length: 1 << 17,
            rms_eps: 1e-5,
            heads: Heads::new(qo, 8),
            head_dim,
            attention_scale: (head_dim as f64).sqrt().recip(),
            attention_soft_cap: None,
            layers: vec![LayerConfig { window: None, rope: 0 }; layers],
            ropes: vec![Rope::new(rope)],
            intermediate_size,
            activation: Activation::Silu,
            experts: None,
            biases: Biases::default(),
            embedding_scale: 1.0,
            residual_scale: 1.0,
            final_soft_cap: None,
        })
    }
}

/// Random numbers of `f16`, as large as keeps products of normed rows near 1.
fn matrix(rows: usize, columns: usize) -> Result<Matrix> {
    let bound = (3.0 / columns as f32).sqrt();
    let mut numbers = vec![0; rows * columns * size_of::<f16>()];
    numbers.par_chunks_exact_mut(columns * size_of::<f16>()).enumerate().for_each(|(row, numbers)| {
        let mut random = StdRng::seed_from_u64(row as u64);
        for number in numbers.chunks_exact_mut(size_of::<f16>()) {
            number.copy_from_slice(&f16::from_f32(random.random_range(-bound..bound)).to_le_bytes());
        }
    });
    Matrix::from_bytes(numbers, GgmlDType::F16, [rows, columns])
}

/// Weights of a shape, with rows for these tokens. All layers have equal ones, each in a place of its own.
pub fn weights(
    config: &Config,
    vocab: VocabPart,
) -> Result<(Ends, impl ExactSizeIterator<Item = Result<Layer>> + use<>)> {
    let Config { hidden_size: hidden, intermediate_size: inner, .. } = *config;
    let [qo, kv] = config.widths();
    let linear = |rows, columns| matrix(rows, columns).map(Linear::from);
    let layer = Layer {
        attention_norm: vec![1.0; hidden],
        qkv: linear(qo + 2 * kv, hidden)?,
        qk_norm: None,
        attention_output: linear(hidden, qo)?,
        attention_post_norm: None,
        mlp_norm: vec![1.0; hidden],
        mlp: LayerMlp::Dense(Mlp { gate_up: linear(2 * inner, hidden)?, down: linear(hidden, inner)? }),
        mlp_post_norm: None,
    };
    let ends = Ends {
        embedding: matrix(vocab.tokens.len(), hidden)?,
        norm: vec![1.0; hidden],
        head: Some(matrix(vocab.tokens.len(), hidden)?),
        vocab,
    };
    Ok((ends, iter::repeat_n(layer, config.layers.len()).map(Ok)))
}
