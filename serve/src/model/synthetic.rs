//! A model of a known shape with random weights, to measure.

use std::iter;

use candle_core::{DType, Device, Tensor};
use clap::ValueEnum;
use flashinfer_rs::{
    attention::Heads,
    rope::{RopeFrequencies, RopeScaling},
};

use crate::{
    Result,
    model::{Biases, Config, Ends, Layer, Linear},
};

/// Shapes by name.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Shape {
    /// Llama 3 8B
    #[value(name = "llama-8b")]
    Llama8b,
}

impl Shape {
    pub fn config(self) -> Result<Config> {
        let Self::Llama8b = self;
        let head_dim = 128;
        Ok(Config {
            num_layers: 32,
            hidden_size: 4096,
            intermediate_size: 14336,
            experts: None,
            biases: Biases::default(),
            vocab_size: 128_256,
            heads: Heads::new(32, 8),
            head_dim,
            context_length: 1 << 17,
            rms_eps: 1e-5,
            rope: RopeFrequencies::new(head_dim, 5e5, &RopeScaling::None)?,
        })
    }
}

/// Weights of a shape. All layers have equal ones, each in a place of its own.
pub fn weights(config: &Config) -> Result<(Ends, impl ExactSizeIterator<Item = Result<Layer>> + use<>)> {
    let Config { hidden_size: hidden, intermediate_size: inner, vocab_size, heads, head_dim, .. } = *config;
    let [qo, kv] = [heads.num_qo_heads, heads.num_kv_heads].map(|heads| heads * head_dim);
    // As large as keeps products of normed rows near 1. The GPU computes in `f16`.
    let matrix = |rows: usize, columns: usize| -> Result<Tensor> {
        let bound = (3.0 / columns as f32).sqrt();
        Ok(Tensor::rand(-bound, bound, (rows, columns), &Device::Cpu)?.to_dtype(DType::F16)?)
    };
    let linear = |rows, columns| Ok::<_, crate::Error>(Linear { weight: matrix(rows, columns)?, bias: None });
    let layer = Layer {
        attention_norm: vec![1.0; hidden],
        qkv: linear(qo + 2 * kv, hidden)?,
        attention_output: linear(hidden, qo)?,
        mlp_norm: vec![1.0; hidden],
        router: None,
        gate_up: linear(2 * inner, hidden)?,
        down: linear(hidden, inner)?,
    };
    let ends = Ends {
        embedding: matrix(vocab_size, hidden)?,
        norm: vec![1.0; hidden],
        head: Some(matrix(vocab_size, hidden)?),
    };
    Ok((ends, iter::repeat_n(layer, config.num_layers).map(Ok)))
}
