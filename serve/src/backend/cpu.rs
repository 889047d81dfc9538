//! The model on the CPU, in `f32`: candle multiplies matrices, and everything
//! else is FlashInfer's operations as this crate's `reference` has them.

use candle_core::{Device, Tensor};
use flashinfer_rs::{
    DType, TensorMut, TensorRef,
    activation::ActivationOptions,
    attention::{AttentionSpec, RunOptions},
    kv::{KvLayout, PageAllocator, PagedKvCache},
    norm::NormOptions,
    reference::{self, Mask},
    rope::{RopeTensors, Rotation},
};

use crate::{
    Result,
    backend::{Backend, Sample, Step, sampler},
    model::{Config, Ends, Experts, Layer, Linear},
};

/// The CPU's weights and cache.
pub struct Cpu {
    config: Config,
    ends: Ends,
    layers: Vec<Layer>,
    cache: PagedKvCache,
    /// Cosines and sines of all positions, `[positions, rotary_dim]`.
    cos_sin: Vec<f32>,
    logits: Vec<f32>,
}

impl Cpu {
    /// Takes the weights and makes the memory of a pool.
    pub fn new(
        config: &Config,
        ends: Ends,
        layers: impl Iterator<Item = Result<Layer>>,
        pool: &PageAllocator,
    ) -> Result<Self> {
        let positions = config.context_length.min(pool.num_pages() * pool.page_size());
        Ok(Self {
            cos_sin: config.rope.cos_sin_rows(positions),
            config: config.clone(),
            ends,
            layers: layers.collect::<Result<_>>()?,
            cache: PagedKvCache::on_host(pool, &[config.kv_shape(DType::F32, KvLayout::Nhd)])?,
            logits: Vec::new(),
        })
    }
}

impl Backend for Cpu {
    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    fn step(&mut self, step: &Step<'_>) -> Result<Vec<Sample>> {
        self.logits.clear();
        self.cache.copy_pages()?;
        let Config { hidden_size, heads, head_dim, .. } = self.config;
        let (batch, rows) = (step.batch, step.tokens.len());
        let (qo, kv) = (heads.num_qo_heads * head_dim, heads.num_kv_heads * head_dim);
        let (q_shape, kv_shape) =
            ([rows, heads.num_qo_heads, head_dim], [rows, heads.num_kv_heads, head_dim]);
        let norm = NormOptions::with_eps(self.config.rms_eps);
        let rotary_dim = self.config.rope.rotary_dim();
        let rotation = Rotation {
            cos_sin_cache: TensorRef::from_slice(
                &self.cos_sin,
                &[self.cos_sin.len() / rotary_dim, rotary_dim],
            )?,
            pos_ids: batch.append_indices().positions(),
            interleave: true,
        };
        let spec = AttentionSpec::new(DType::F32, head_dim);

        let mut residual = gather(&self.ends.embedding, step.tokens)?;
        let mut x = vec![0.0; residual.len()];
        let first = self.layers.first().map_or(&self.ends.norm, |layer| &layer.attention_norm);
        reference::rmsnorm(
            &mut TensorMut::from_slice(&mut x, &[rows, hidden_size])?,
            &TensorRef::from_slice(&residual, &[rows, hidden_size])?,
            &TensorRef::from_slice(first, &[hidden_size])?,
            &norm,
        )?;
        // Adds to the residual and norms the sum.
        let mut add = |x: &mut [f32], weight: &[f32]| {
            reference::fused_add_rmsnorm(
                &mut TensorMut::from_slice(x, &[rows, hidden_size])?,
                &mut TensorMut::from_slice(&mut residual, &[rows, hidden_size])?,
                &TensorRef::from_slice(weight, &[hidden_size])?,
                &norm,
            )
        };
        for (index, layer) in self.layers.iter().enumerate() {
            let qkv = multiply(x, &layer.qkv)?;
            let columns = |start, len| values(&qkv.narrow(1, start, len)?);
            let (mut q, mut k, v) = (columns(0, qo)?, columns(qo, kv)?, columns(qo + kv, kv)?);
            let mut turned = RopeTensors::InPlace {
                q: TensorMut::from_slice(&mut q, &q_shape)?,
                k: TensorMut::from_slice(&mut k, &kv_shape)?,
            };
            reference::apply_rope_pos_ids_cos_sin_cache(&mut turned, &rotation)?;
            reference::append_paged_kv_cache(
                &TensorRef::from_slice(&k, &kv_shape)?,
                &TensorRef::from_slice(&v, &kv_shape)?,
                batch.append_indices(),
                &mut self.cache.layer_mut(0, index)?,
                batch.pages(),
            )?;
            let mut attention = vec![0.0; rows * qo];
            reference::batch_prefill_paged(
                &spec,
                &TensorRef::from_slice(&q, &q_shape)?,
                &self.cache.layer(0, index)?,
                batch.queries(),
                batch.pages(),
                &mut TensorMut::from_slice(&mut attention, &q_shape)?,
                None,
                Mask::Causal,
                &RunOptions::default(),
            )?;
            x = values(&multiply(attention, &layer.attention_output)?)?;
            add(&mut x, &layer.mlp_norm)?;
            x = mlp(&self.config, layer, &x)?;
            let next = self.layers.get(index + 1).map_or(&self.ends.norm, |next| &next.attention_norm);
            add(&mut x, next)?;
        }
        let head = self.ends.head.as_ref().unwrap_or(&self.ends.embedding);
        let wanted = step.outputs.iter().flat_map(|output| &x[output.row * hidden_size..][..hidden_size]);
        self.logits = match step.outputs.is_empty() {
            true => Vec::new(),
            false => {
                let head = Linear { weight: head.clone(), bias: None };
                values(&multiply(wanted.copied().collect(), &head)?)?
            }
        };
        sampler::sample(step.outputs, &self.logits, self.config.vocab_size)
    }

    fn logits(&self) -> Result<Vec<f32>> {
        Ok(self.logits.clone())
    }
}

/// The rows of a matrix that belong to these tokens.
fn gather(embedding: &Tensor, tokens: &[u32]) -> Result<Vec<f32>> {
    let tokens = Tensor::new(tokens, &Device::Cpu)?;
    values(&embedding.index_select(&tokens, 0)?)
}

/// What a layer's experts make of rows, each of those that the router gives it.
fn mlp(config: &Config, layer: &Layer, x: &[f32]) -> Result<Vec<f32>> {
    let Config { hidden_size: hidden, intermediate_size: inner, .. } = *config;
    let rows = x.len() / hidden;
    let routes = match (config.experts, &layer.router) {
        (Some(experts), Some(router)) => route(experts, &values(&multiply(x.into(), router)?)?),
        _ => vec![(0..rows).map(|row| (row, 1.0)).collect()],
    };
    let mut out = vec![0.0; x.len()];
    for (expert, rows) in routes.iter().enumerate().filter(|(_, rows)| !rows.is_empty()) {
        let gate_up = Linear {
            weight: layer.gate_up.weight.narrow(0, expert * 2 * inner, 2 * inner)?,
            bias: layer.gate_up.bias.clone(),
        };
        let down = Linear {
            weight: layer.down.weight.narrow(1, expert * inner, inner)?,
            bias: layer.down.bias.clone(),
        };
        let mine = rows.iter().flat_map(|&(row, _)| &x[row * hidden..][..hidden]);
        let gate_up = values(&multiply(mine.copied().collect(), &gate_up)?)?;
        let mut between = vec![0.0; rows.len() * inner];
        reference::silu_and_mul(
            &mut TensorMut::from_slice(&mut between, &[rows.len(), inner])?,
            &TensorRef::from_slice(&gate_up, &[rows.len(), 2 * inner])?,
            &ActivationOptions::default(),
        )?;
        let parts = values(&multiply(between, &down)?)?;
        for (&(row, share), part) in rows.iter().zip(parts.chunks_exact(hidden)) {
            for (sum, value) in out[row * hidden..][..hidden].iter_mut().zip(part) {
                *sum += share * value;
            }
        }
    }
    Ok(out)
}

/// The rows of each expert, and its share of each: the softmax of the scores of
/// those that a row has, which are the highest; of equal ones the first.
fn route(Experts { count, used }: Experts, scores: &[f32]) -> Vec<Vec<(usize, f32)>> {
    let mut routes = vec![Vec::new(); count];
    for (row, scores) in scores.chunks_exact(count).enumerate() {
        let mut best: Vec<_> = (0..count).collect();
        best.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        best.truncate(used);
        let shares: Vec<_> = best.iter().map(|&expert| (scores[expert] - scores[best[0]]).exp()).collect();
        let sum: f32 = shares.iter().sum();
        for (expert, share) in best.into_iter().zip(shares) {
            routes[expert].push((row, share / sum));
        }
    }
    routes
}

/// `x · weightᵀ + bias` for rows `x`.
fn multiply(x: Vec<f32>, Linear { weight, bias }: &Linear) -> Result<Tensor> {
    let shape = (x.len() / weight.dim(1)?, weight.dim(1)?);
    let x = Tensor::from_vec(x, shape, &Device::Cpu)?;
    let product = x.matmul(&weight.t()?)?;
    Ok(match bias {
        Some(bias) => product.broadcast_add(bias)?,
        None => product,
    })
}

fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1()?)
}
