//! What steps compute in, and the products that they compute.

use std::sync::Arc;

use flashinfer_rs::{DType, Stream, cudarc::Tensor};

use super::{half::HalfTensor, weights::RESIDUAL_SCALE};
use crate::{
    Result,
    backend::{
        experts::Routing,
        matmul::{Added, CublasLt, Matmul, Product},
    },
    model::Config,
};

/// Scratch memory of products: what cuBLASLt is recommended to have on Hopper.
const SCRATCH_BYTES: usize = 32 << 20;

/// Memory for as many rows as there may be.
pub struct Buffers {
    pub residual: HalfTensor,
    pub x: HalfTensor,
    /// `[rows, num_qo_heads + 2 * num_kv_heads, head_dim]`.
    pub qkv: HalfTensor,
    pub attention: HalfTensor,
    /// `[rows * experts, 2 * intermediate_size]`.
    pub gate_up: HalfTensor,
    pub inner: HalfTensor,
    pub routing: Option<Routing>,
    pub scratch: Tensor<u8>,
}

impl Buffers {
    pub fn new(stream: &Stream, config: &Config, dtype: DType, rows: usize) -> Result<Self> {
        let (heads, experts, inner) = (config.heads, config.num_experts(), config.intermediate_size);
        let zeros = |shape: &[usize]| HalfTensor::zeros(stream, dtype, shape);
        let qkv = heads.num_qo_heads + 2 * heads.num_kv_heads;
        Ok(Self {
            residual: zeros(&[rows, config.hidden_size])?,
            x: zeros(&[rows, config.hidden_size])?,
            qkv: zeros(&[rows, qkv, config.head_dim])?,
            attention: zeros(&[rows, heads.num_qo_heads, config.head_dim])?,
            gate_up: zeros(&[rows * experts, 2 * inner])?,
            inner: zeros(&[rows * experts, inner])?,
            routing: config.experts.map(|experts| Routing::new(stream, experts, rows)).transpose()?,
            scratch: Tensor::zeros(stream, &[SCRATCH_BYTES])?,
        })
    }
}

/// The products of all layers, for one number of rows.
pub struct Products {
    pub qkv: Matmul,
    pub attention_output: Matmul,
    pub router: Option<Matmul>,
    pub gate_up: Matmul,
    pub down: Matmul,
}

impl Products {
    pub fn new(cublas: &Arc<CublasLt>, config: &Config, dtype: DType, rows: usize) -> Result<Self> {
        let hidden = config.hidden_size;
        let inner = config.num_experts() * config.intermediate_size;
        let qo = config.heads.num_qo_heads * config.head_dim;
        let kv = config.heads.num_kv_heads * config.head_dim;
        let product = |input, output, factor, bias, out_dtype| {
            let added = if bias { Added::Bias } else { Added::Nothing };
            let product = Product { rows, input, output, factor, added, dtype, out_dtype };
            Matmul::new(cublas, product, SCRATCH_BYTES)
        };
        let biases = config.biases;
        let router = config.experts.map(|experts| product(hidden, experts.count, 1.0, false, DType::F32));
        Ok(Self {
            qkv: product(hidden, qo + 2 * kv, 1.0, biases.qkv, dtype)?,
            attention_output: product(qo, hidden, RESIDUAL_SCALE, biases.attention_output, dtype)?,
            router: router.transpose()?,
            gate_up: product(hidden, 2 * inner, 1.0, biases.gate_up, dtype)?,
            down: product(inner, hidden, RESIDUAL_SCALE, biases.down, dtype)?,
        })
    }
}

/// Memory for the rows whose logits are wanted, and what is computed of them.
pub struct Outputs {
    /// Their hidden states.
    pub hidden: HalfTensor,
    pub logits: Tensor<f32>,
    pub tokens: Tensor<i32>,
}

impl Outputs {
    pub fn new(stream: &Stream, config: &Config, dtype: DType, rows: usize) -> Result<Self> {
        Ok(Self {
            hidden: HalfTensor::zeros(stream, dtype, &[rows, config.hidden_size])?,
            logits: Tensor::zeros(stream, &[rows, config.vocab_size])?,
            tokens: Tensor::zeros(stream, &[rows])?,
        })
    }

    /// How many rows there is room for.
    pub fn capacity(&self) -> usize {
        self.tokens.view().numel()
    }

    /// The product that makes logits of so many rows.
    pub fn product(cublas: &Arc<CublasLt>, config: &Config, dtype: DType, rows: usize) -> Result<Matmul> {
        let (input, output) = (config.hidden_size, config.vocab_size);
        let (factor, added) = (1.0, Added::Nothing);
        let product = Product { rows, input, output, factor, added, dtype, out_dtype: DType::F32 };
        Matmul::new(cublas, product, SCRATCH_BYTES)
    }
}
