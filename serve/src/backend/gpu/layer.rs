//! The two halves of a layer: attention, and the MLP or its experts.

use flashinfer_rs::{
    Result as FlashInferResult, Stream, TensorMut, TensorRef,
    activation::{ActivationOptions, gelu_tanh_and_mul, silu_and_mul},
    norm::rmsnorm,
};

use super::{
    append::NewTokens,
    buffers::{Buffers, SharedBuffers},
    network::{Network, Pass},
    products::SharedProducts,
    weights::{Layer, SharedExpert},
};
use crate::{Result, model::architecture::Activation};

impl Network {
    /// What attention makes of `x`: in `made` if that is normed, else in `x`; of ranks, a part of the sum.
    pub fn attention(&self, pass: &mut Pass<'_>, index: usize, layer: &Layer) -> Result<()> {
        let Pass { padded_rows, products, .. } = *pass;
        let Buffers { x, qkv, .. } = &mut *pass.buffers;
        let mut qkv = qkv.rows_mut(padded_rows)?;
        pass.multiplier.run(&products.qkv, &mut qkv, &x.rows(padded_rows)?, &layer.qkv.view())?;
        self.attend(pass, index, layer)?;
        let Buffers { x, made, attention, .. } = &mut *pass.buffers;
        let mut out = made.as_mut().unwrap_or(x).rows_mut(padded_rows)?;
        let attention = attention.rows(padded_rows)?;
        let weight = layer.attention_output.view();
        pass.multiplier.run(&products.attention_output, &mut out, &attention, &weight)
    }

    /// Attention of the queries, keys and values in `qkv`.
    pub fn attend(&self, pass: &mut Pass<'_>, index: usize, layer: &Layer) -> Result<()> {
        let Pass { rows, tables, plans, .. } = *pass;
        let Buffers { qkv, qk, attention, no_queries, .. } = &mut *pass.buffers;
        let (stream, heads) = (&self.stream, self.config.heads);
        let (mut q, kv) = qkv.rows_mut(rows)?.split_at(1, heads.num_qo_heads)?;
        let (mut k, v) = kv.split_at(1, heads.num_kv_heads)?;
        if let (Some(qk), Some([q_norm, k_norm])) = (qk, &layer.qk_norm) {
            let options = self.widths.norm_options(self.config.rms_eps);
            let (mut normed_q, mut normed_k) = qk.rows_mut(rows)?.split_at(1, heads.num_qo_heads)?;
            rmsnorm(stream, &mut normed_q, &q.as_ref(), &q_norm.view(), &options)?;
            rmsnorm(stream, &mut normed_k, &k.as_ref(), &k_norm.view(), &options)?;
            (q, k) = (normed_q, normed_k);
        }
        let no_queries = no_queries.as_mut().map(|none| none.view_mut().narrow(0, 0, rows)).transpose()?;
        let mut new = NewTokens { q, k, v: v.as_ref(), no_queries };
        self.append(index, tables, pass.cache, &mut new)?;
        let (q, cache) = (new.q.as_ref(), pass.cache.layer(index)?);
        Ok(plans.run(index, &q, &cache, &mut attention.rows_mut(rows)?)?)
    }

    /// What the MLP, or experts, make of `x`: in `made` if that is normed, else in `x`; of ranks, a part of the sum.
    pub fn mlp(&self, pass: &mut Pass<'_>, layer: &Layer) -> Result<()> {
        let Pass { rows, padded_rows, products, .. } = *pass;
        let experts = self.config.num_experts();
        if let (Some(weights), Some(products)) = (&layer.shared, &products.shared) {
            self.shared_expert(pass, weights, products)?;
        }
        let Buffers { x, made, gate_up, inner, routing, shared, .. } = &mut *pass.buffers;
        let (multiplier, input) = (&mut *pass.multiplier, x.rows(padded_rows)?);
        if let (Some(router), Some(product), Some(routing)) = (&layer.router, &products.router, &mut *routing)
        {
            let mut scores = routing.scores_mut(padded_rows)?;
            multiplier.run(product, &mut scores, &input, &router.view())?;
            routing.choose(&self.kernels, rows)?;
        }
        let mut both = gate_up.rows_mut(padded_rows * experts)?;
        multiplier.run(&products.gate_up, &mut both, &input, &layer.gate_up.view())?;
        let mut between = inner.rows_mut(rows * experts)?;
        activate(
            self.config.activation,
            &self.stream,
            &mut between,
            &both.as_ref().narrow(0, 0, rows * experts)?,
        )?;
        if let Some(routing) = routing {
            self.kernels.scale_rows(&mut between, &routing.shares())?;
        }
        let between = inner.rows(padded_rows * experts)?;
        let mut out = made.as_mut().unwrap_or(x).rows_mut(padded_rows)?;
        multiplier.run(&products.down, &mut out, &between, &layer.down.view())?;
        if let (Some(weights), Some(products), Some(shared)) = (&layer.shared, &products.shared, shared) {
            let inner = shared.inner.rows(padded_rows)?;
            multiplier.run(&products.down, &mut out, &inner, &weights.down.view())?;
        }
        Ok(())
    }

    /// What an expert that every token has makes of `x` between its two products, by
    /// its share.
    fn shared_expert(
        &self,
        pass: &mut Pass<'_>,
        weights: &SharedExpert,
        products: &SharedProducts,
    ) -> Result<()> {
        let Pass { rows, padded_rows, .. } = *pass;
        let Buffers { x, shared: Some(buffers), .. } = &mut *pass.buffers else {
            return Err("there is no memory for a shared expert".into());
        };
        let SharedBuffers { shares, gate_up, inner } = buffers;
        let (multiplier, input) = (&mut *pass.multiplier, x.rows(padded_rows)?);
        let mut shares = shares.view_mut().narrow(0, 0, padded_rows)?;
        multiplier.run(&products.gate, &mut shares, &input, &weights.gate.view())?;
        self.kernels.sigmoid(&mut shares)?;
        let mut both = gate_up.rows_mut(padded_rows)?;
        multiplier.run(&products.gate_up, &mut both, &input, &weights.gate_up.view())?;
        let mut between = inner.rows_mut(rows)?;
        activate(self.config.activation, &self.stream, &mut between, &both.as_ref().narrow(0, 0, rows)?)?;
        self.kernels.scale_rows(&mut between, &shares.as_ref())
    }
}

/// The activated gate times up.
fn activate(
    activation: Activation,
    stream: &Stream,
    out: &mut TensorMut<'_>,
    gate_up: &TensorRef<'_>,
) -> FlashInferResult<()> {
    let options = ActivationOptions::default();
    match activation {
        Activation::Silu => silu_and_mul(stream, out, gate_up, &options),
        Activation::GeluTanh => gelu_tanh_and_mul(stream, out, gate_up, &options),
    }
}
