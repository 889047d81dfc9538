//! The layers of a model, one after the other.

use candle_core::{Device, Tensor};
use flashinfer_rs::{
    DType, TensorMut, TensorRef,
    attention::{AttentionSpec, RunOptions},
    kv::PagedKvCache,
    norm::NormOptions,
    reference::{self, Mask},
    rope::{RopeTensors, Rotation},
};

use super::{
    mlp,
    product::{linear, multiply, rows},
};
use crate::{
    Result,
    backend::Step,
    model::{Config, Ends, Layer, config::LayerConfig, weights::QkNorm},
};

/// What steps read and do not change.
pub struct Network {
    pub config: Config,
    ends: Ends,
    layers: Vec<Layer>,
    /// Cosines and sines of all positions, `[positions, rotary_dim]`, of each of
    /// the rotary embeddings.
    cos_sin: Vec<Vec<f32>>,
}

impl Network {
    /// For sequences of up to so many tokens.
    pub fn new(config: &Config, ends: Ends, layers: Vec<Layer>, positions: usize) -> Self {
        let rows = config.ropes.iter().map(|rope| rope.for_length(positions).cos_sin_rows(positions));
        Self { cos_sin: rows.collect(), config: config.clone(), ends, layers }
    }

    /// Computes a step, and gives the logits of its outputs.
    pub fn run(&self, step: &Step<'_>, cache: &mut PagedKvCache) -> Result<Vec<f32>> {
        let Config { hidden_size, residual_scale, embedding_scale, .. } = self.config;
        let tokens = Tensor::new(step.tokens, &Device::Cpu)?;
        let mut residual: Vec<f32> = self.ends.embedding.0.embedding(&tokens)?.flatten_all()?.to_vec1()?;
        residual.iter_mut().for_each(|x| *x *= embedding_scale as f32);
        let mut add = |x: Vec<f32>, post_norm: &Option<Vec<f32>>| -> Result<Vec<f32>> {
            let x = match post_norm {
                Some(weight) => self.norm(&x, weight)?,
                None => x,
            };
            residual.iter_mut().zip(x).for_each(|(sum, x)| *sum += residual_scale as f32 * x);
            Ok(residual.clone())
        };
        let mut sum = add(vec![0.0; step.tokens.len() * hidden_size], &None)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let x = self.attention(index, layer, self.norm(&sum, &layer.attention_norm)?, step, cache)?;
            sum = add(x, &layer.attention_post_norm)?;
            let x = mlp::run(&self.config, &layer.mlp, self.norm(&sum, &layer.mlp_norm)?)?;
            sum = add(x, &layer.mlp_post_norm)?;
        }
        if step.outputs.is_empty() {
            return Ok(Vec::new());
        }
        let wanted = step
            .outputs
            .iter()
            .map(|output| output.row)
            .flat_map(|row| &sum[row * hidden_size..][..hidden_size]);
        let x = self.norm(&wanted.copied().collect::<Vec<_>>(), &self.ends.norm)?;
        let head = self.ends.head.as_ref().unwrap_or(&self.ends.embedding);
        let mut logits = multiply(&rows(x, hidden_size)?, head)?;
        if let Some(cap) = self.config.final_soft_cap {
            let cap = cap as f32;
            logits.iter_mut().for_each(|logit| *logit = cap * (*logit / cap).tanh());
        }
        Ok(logits)
    }

    fn attention(
        &self,
        index: usize,
        layer: &Layer,
        x: Vec<f32>,
        step: &Step<'_>,
        cache: &mut PagedKvCache,
    ) -> Result<Vec<f32>> {
        let Config { hidden_size, heads, head_dim, attention_scale, .. } = self.config;
        let LayerConfig { window, rope } = self.config.layers[index];
        let (batch, count) = (step.batch, step.tokens.len());
        let [qo, kv] = self.config.widths();
        let q_shape = [count, heads.num_qo_heads, head_dim];
        let kv_shape = [count, heads.num_kv_heads, head_dim];
        let qkv = linear(&rows(x, hidden_size)?, &layer.qkv)?;
        let columns = |start: usize, len: usize| -> Vec<f32> {
            qkv.chunks_exact(qo + 2 * kv).flat_map(|row| &row[start..start + len]).copied().collect()
        };
        let (mut q, mut k, v) = (columns(0, qo), columns(qo, kv), columns(qo + kv, kv));
        if let Some(QkNorm { q: q_norm, k: k_norm }) = &layer.qk_norm {
            (q, k) = (self.norm(&q, q_norm)?, self.norm(&k, k_norm)?);
        }
        let rotary_dim = self.config.ropes[rope].rotary_dim();
        let cos_sin = &self.cos_sin[rope];
        let rotation = Rotation {
            cos_sin_cache: TensorRef::from_slice(cos_sin, &[cos_sin.len() / rotary_dim, rotary_dim])?,
            pos_ids: batch.append_indices().positions(),
            interleave: self.config.architecture.interleave,
        };
        let mut turned = RopeTensors::InPlace {
            q: TensorMut::from_slice(&mut q, &q_shape)?,
            k: TensorMut::from_slice(&mut k, &kv_shape)?,
        };
        reference::apply_rope_pos_ids_cos_sin_cache(&mut turned, &rotation)?;
        reference::append_paged_kv_cache(
            &TensorRef::from_slice(&k, &kv_shape)?,
            &TensorRef::from_slice(&v, &kv_shape)?,
            batch.append_indices(),
            &mut cache.layer_mut(0, index)?,
            batch.pages(),
        )?;
        let mut spec = AttentionSpec::new(DType::F32, head_dim);
        spec.window_left = window.map(|window| (window - 1) as u32);
        spec.logits_soft_cap = self.config.attention_soft_cap.map(|cap| cap as f32);
        let mut attention = vec![0.0; count * qo];
        reference::batch_prefill_paged(
            &spec,
            &TensorRef::from_slice(&q, &q_shape)?,
            &cache.layer(0, index)?,
            batch.queries(),
            batch.pages(),
            &mut TensorMut::from_slice(&mut attention, &q_shape)?,
            None,
            Mask::Causal,
            &RunOptions::with_sm_scale(attention_scale),
        )?;
        linear(&rows(attention, qo)?, &layer.attention_output)
    }

    /// The norm of rows of the weight's length.
    fn norm(&self, x: &[f32], weight: &[f32]) -> Result<Vec<f32>> {
        let shape = [x.len() / weight.len(), weight.len()];
        let mut normed = vec![0.0; x.len()];
        reference::rmsnorm(
            &mut TensorMut::from_slice(&mut normed, &shape)?,
            &TensorRef::from_slice(x, &shape)?,
            &TensorRef::from_slice(weight, &[weight.len()])?,
            &NormOptions::with_eps(self.config.rms_eps),
        )?;
        Ok(normed)
    }
}
