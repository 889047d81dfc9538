//! What steps compute in.

use flashinfer_rs::{DType, Stream, gpu::Tensor};
use float8::F8E4M3;

use super::{half::HalfTensor, heads::HeadWidths, ranks::Ranks};
use crate::{
    Result,
    backend::experts::Routing,
    model::{Config, shard::VocabPart},
};

/// Memory for as many rows as there may be.
pub struct Buffers {
    pub residual: HalfTensor,
    /// What is normed, `[rows, hidden_size]`.
    pub x: HalfTensor,
    /// What attention or the MLP makes, where that is normed before it is added.
    pub made: Option<HalfTensor>,
    /// `[rows, num_qo_heads + 2 * num_kv_heads, head_dim]`.
    pub qkv: HalfTensor,
    /// Normed queries and keys, if they are.
    pub qk: Option<HalfTensor>,
    pub attention: HalfTensor,
    /// `[rows * experts, 2 * intermediate_size]`.
    pub gate_up: HalfTensor,
    pub inner: HalfTensor,
    pub routing: Option<Routing>,
    pub shared: Option<SharedBuffers>,
    /// Queries of no heads, for a cache of `e4m3`.
    pub no_queries: Option<Tensor<F8E4M3>>,
}

/// Memory of an expert that every token has.
pub struct SharedBuffers {
    /// Its share of each row.
    pub shares: Tensor<f32>,
    pub gate_up: HalfTensor,
    pub inner: HalfTensor,
}

impl Buffers {
    /// With `ranks`, what is added up over them lies in memory that all their GPUs reach.
    pub fn new(
        stream: &Stream,
        config: &Config,
        widths: HeadWidths,
        kv: DType,
        rows: usize,
        ranks: Option<&Ranks>,
    ) -> Result<Self> {
        let (heads, experts, inner) = (config.heads, config.num_experts(), config.intermediate_size);
        let (hidden, head_dim) = (config.hidden_size, widths.padded);
        let zeros = |shape: &[usize]| HalfTensor::zeros(stream, config.dtype, shape);
        let hidden_rows = || match ranks {
            Some(ranks) => ranks.zeros(config.dtype, &[rows, hidden]),
            None => Ok(zeros(&[rows, hidden])?),
        };
        let qk = heads.num_qo_heads + heads.num_kv_heads;
        let shared = config.experts.and_then(|experts| experts.shared).map(|inner| -> Result<_> {
            Ok(SharedBuffers {
                shares: Tensor::zeros(stream, &[rows])?,
                gate_up: zeros(&[rows, 2 * inner])?,
                inner: zeros(&[rows, inner])?,
            })
        });
        Ok(Self {
            residual: hidden_rows()?,
            x: hidden_rows()?,
            made: config.architecture.post_norms.then(hidden_rows).transpose()?,
            qkv: zeros(&[rows, qk + heads.num_kv_heads, head_dim])?,
            qk: config.architecture.qk_norm.then(|| zeros(&[rows, qk, head_dim])).transpose()?,
            attention: zeros(&[rows, heads.num_qo_heads, head_dim])?,
            gate_up: zeros(&[rows * experts, 2 * inner])?,
            inner: zeros(&[rows * experts, inner])?,
            routing: config.experts.map(|experts| Routing::new(stream, experts, rows)).transpose()?,
            shared: shared.transpose()?,
            no_queries: (kv == DType::E4M3)
                .then(|| Tensor::zeros(stream, &[rows, 0, head_dim]))
                .transpose()?,
        })
    }
}

/// Memory for the rows whose logits are wanted, and what is computed of them.
pub struct Outputs {
    /// Their hidden states.
    pub hidden: HalfTensor,
    pub logits: Tensor<f32>,
    /// What ranks make of the logits.
    pub parts: Option<LogitParts>,
}

/// Logits of the tokens of one rank, and of all ranks.
pub struct LogitParts {
    /// `[rows, tokens]`.
    pub mine: Tensor<f32>,
    /// `[ranks * rows, tokens]`.
    pub all: Tensor<f32>,
    /// If all ranks have as many tokens.
    pub largest: Option<LargestParts>,
}

/// The largest logits of one rank, and of all ranks.
pub struct LargestParts {
    /// Where they are, `[rows]`.
    pub places: Tensor<i32>,
    /// They and their tokens, `[rows, 2]`.
    pub mine: Tensor<f32>,
    /// `[ranks * rows, 2]`.
    pub all: Tensor<f32>,
}

impl Outputs {
    /// For so many rows, of a model that so many ranks have.
    pub fn new(
        stream: &Stream,
        config: &Config,
        vocab: &VocabPart,
        ranks: usize,
        rows: usize,
    ) -> Result<Self> {
        let is_even = ranks * vocab.rows == config.vocab_size;
        let largest = || -> Result<_> {
            Ok(LargestParts {
                places: Tensor::zeros(stream, &[rows])?,
                mine: Tensor::zeros(stream, &[rows, 2])?,
                all: Tensor::zeros(stream, &[ranks * rows, 2])?,
            })
        };
        let parts = (ranks > 1).then(|| -> Result<_> {
            Ok(LogitParts {
                mine: Tensor::zeros(stream, &[rows, vocab.rows])?,
                all: Tensor::zeros(stream, &[ranks * rows, vocab.rows])?,
                largest: is_even.then(largest).transpose()?,
            })
        });
        Ok(Self {
            hidden: HalfTensor::zeros(stream, config.dtype, &[rows, config.hidden_size])?,
            logits: Tensor::zeros(stream, &[rows, config.vocab_size])?,
            parts: parts.transpose()?,
        })
    }

    /// The hidden states, and where the product puts its rows.
    pub fn product_mut(&mut self) -> (&mut HalfTensor, &mut Tensor<f32>) {
        let Self { hidden, logits, parts } = self;
        (hidden, parts.as_mut().map_or(logits, |parts| &mut parts.mine))
    }

    /// Whether ranks may compare their largest logits, instead of telling each other all.
    pub fn can_compare(&self) -> bool {
        self.parts.as_ref().is_some_and(|parts| parts.largest.is_some())
    }

    /// How many rows there is room for.
    pub fn capacity(&self) -> usize {
        self.logits.view().shape()[0] as usize
    }
}
