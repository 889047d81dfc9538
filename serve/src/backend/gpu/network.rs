//! The network of a model: what a step enqueues.

use std::sync::Arc;

use cudarc::driver::CudaStream;
use flashinfer_rs::{
    Stream, TensorRef,
    activation::{ActivationOptions, silu_and_mul},
    kv::{BatchTables, PagedKvCache},
    norm::{NormOptions, fused_add_rmsnorm, rmsnorm},
    page::append_paged_kv_cache,
    rope::{CosSinCache, RopeTensors, Rotation, apply_rope_pos_ids_cos_sin_cache},
    sampling::argmax,
};

use super::{
    attention::Plans,
    buffers::{Buffers, Outputs, Products},
    half::HalfTensor,
    kernels::Kernels,
    rows::Rows,
    sampler::Sampler,
    weights::{Layer, RESIDUAL_SCALE, Weights},
};
use crate::{Result, backend::matmul::Matmul, model::Config};

/// What steps read and do not change.
pub struct Network {
    pub cuda: Arc<CudaStream>,
    /// The same.
    pub stream: Stream,
    pub config: Config,
    pub weights: Weights,
    pub rope: CosSinCache,
    pub kernels: Kernels,
}

/// What a step works with.
pub struct Pass<'a> {
    /// The rows that it has.
    pub rows: usize,
    /// The rows that its products have, whose further ones mean nothing.
    pub padded_rows: usize,
    /// The tokens of all rows.
    pub tokens: &'a Rows,
    pub tables: &'a BatchTables,
    pub plans: &'a Plans<'a>,
    pub products: &'a Products,
    pub cache: &'a mut PagedKvCache,
    pub buffers: &'a mut Buffers,
}

/// Logits that a step is to give.
pub struct Head<'a> {
    /// So many, of which the first are wanted.
    pub rows: usize,
    /// The rows that they are of; `None` if they are those of the step.
    pub selected: Option<&'a Rows>,
    pub product: &'a Matmul,
    pub outputs: &'a mut Outputs,
    /// What chooses the tokens; `None` takes the largest logits.
    pub sampler: Option<&'a mut Sampler>,
}

impl Network {
    /// Enqueues a step up to the last norm, whose results are in `x`.
    pub fn run(&self, pass: &mut Pass<'_>) -> Result<()> {
        let Buffers { residual, x, .. } = &mut *pass.buffers;
        let mut embedded = residual.rows_mut(pass.padded_rows)?;
        let embedding = self.weights.embedding.view();
        self.kernels.gather_rows(&mut embedded, &embedding, pass.tokens, RESIDUAL_SCALE)?;
        let first = self.weights.layers.first().map_or(&self.weights.norm, |layer| &layer.attention_norm);
        let (mut x, residual) = (x.rows_mut(pass.rows)?, residual.rows(pass.rows)?);
        rmsnorm(&self.stream, &mut x, &residual, &first.view(), &self.norm_options())?;
        for (index, layer) in self.weights.layers.iter().enumerate() {
            self.attention(pass, index, layer)?;
            self.add(pass, &layer.mlp_norm)?;
            self.mlp(pass, layer)?;
            let next = self.weights.layers.get(index + 1);
            self.add(pass, next.map_or(&self.weights.norm, |next| &next.attention_norm))?;
        }
        Ok(())
    }

    /// Enqueues the logits of rows, and the choice of tokens.
    pub fn head(&self, pass: &mut Pass<'_>, head: &mut Head<'_>) -> Result<()> {
        let Buffers { x, scratch, .. } = &mut *pass.buffers;
        let Outputs { hidden, logits, tokens } = &mut *head.outputs;
        let hidden: TensorRef<'_> = match head.selected {
            Some(rows) => {
                let table = x.rows(rows.bound())?;
                self.kernels.gather_rows(&mut hidden.rows_mut(head.rows)?, &table, rows, 1.0)?;
                hidden.rows(head.rows)?
            }
            None => x.rows(head.rows)?,
        };
        let mut logits = logits.view_mut().narrow(0, 0, head.rows)?;
        head.product.run(&mut logits, &hidden, &self.weights.head(), &mut scratch.view_mut())?;
        let mut tokens = tokens.view_mut().narrow(0, 0, head.rows)?;
        match &mut head.sampler {
            Some(sampler) => sampler.enqueue(&self.cuda, &self.stream, &mut tokens, &logits.as_ref()),
            None => Ok(argmax(&self.stream, &mut tokens, &logits.as_ref())?),
        }
    }

    fn norm_options(&self) -> NormOptions {
        let scale = f64::from(RESIDUAL_SCALE);
        NormOptions::with_eps(self.config.rms_eps * scale * scale)
    }

    fn attention(&self, pass: &mut Pass<'_>, index: usize, layer: &Layer) -> Result<()> {
        let Pass { rows, padded_rows, tables, plans, products, .. } = *pass;
        let Buffers { x, qkv, attention, scratch, .. } = &mut *pass.buffers;
        let (stream, heads) = (&self.stream, self.config.heads);
        let mut scratch = scratch.view_mut();
        let mut qkv = qkv.rows_mut(padded_rows)?;
        products.qkv.run(&mut qkv, &x.rows(padded_rows)?, &layer.qkv.view(), &mut scratch)?;
        let (mut q, kv) = qkv.narrow(0, 0, rows)?.split_at(1, heads.num_qo_heads)?;
        let (mut k, v) = kv.split_at(1, heads.num_kv_heads)?;
        let mut turned = RopeTensors::InPlace { q: q.reborrow(), k: k.reborrow() };
        let rotation = Rotation::interleaved(self.rope.view()?, &tables.append);
        apply_rope_pos_ids_cos_sin_cache(stream, &mut turned, &rotation)?;
        let mut cache = pass.cache.layer_mut(0, index)?;
        append_paged_kv_cache(stream, &k.as_ref(), &v.as_ref(), &tables.append, &mut cache, &tables.pages)?;
        plans.run(index, &q.as_ref(), &pass.cache.layer(0, index)?, &mut attention.rows_mut(rows)?)?;
        let (mut x, attention) = (x.rows_mut(padded_rows)?, attention.rows(padded_rows)?);
        products.attention_output.run(&mut x, &attention, &layer.attention_output.view(), &mut scratch)
    }

    fn mlp(&self, pass: &mut Pass<'_>, layer: &Layer) -> Result<()> {
        let Pass { rows, padded_rows, products, .. } = *pass;
        let Buffers { x, gate_up, inner, routing, scratch, .. } = &mut *pass.buffers;
        let experts = self.config.num_experts();
        let mut scratch = scratch.view_mut();
        let input = x.rows(padded_rows)?;
        if let (Some(router), Some(product), Some(routing)) = (&layer.router, &products.router, &mut *routing)
        {
            let mut scores = routing.scores_mut(padded_rows)?;
            product.run(&mut scores, &input, &router.view(), &mut scratch)?;
            routing.choose(rows)?;
        }
        let mut both = gate_up.rows_mut(padded_rows * experts)?;
        products.gate_up.run(&mut both, &input, &layer.gate_up.view(), &mut scratch)?;
        let mut between = inner.rows_mut(rows * experts)?;
        let both = both.as_ref().narrow(0, 0, rows * experts)?;
        silu_and_mul(&self.stream, &mut between, &both, &ActivationOptions::default())?;
        if let Some(routing) = routing {
            self.kernels.scale_rows(&mut between, &routing.shares())?;
        }
        let between = inner.rows(padded_rows * experts)?;
        products.down.run(&mut x.rows_mut(padded_rows)?, &between, &layer.down.view(), &mut scratch)
    }

    /// Adds to the residual and norms the sum.
    fn add(&self, pass: &mut Pass<'_>, norm: &HalfTensor) -> Result<()> {
        let Buffers { residual, x, .. } = &mut *pass.buffers;
        let (mut x, mut residual) = (x.rows_mut(pass.rows)?, residual.rows_mut(pass.rows)?);
        Ok(fused_add_rmsnorm(&self.stream, &mut x, &mut residual, &norm.view(), &self.norm_options())?)
    }
}
