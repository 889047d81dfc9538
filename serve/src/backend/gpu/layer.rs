//! The two halves of a layer: attention, and the MLP or its experts.

use flashinfer_rs::{
    Result as FlashInferResult, Stream, TensorMut, TensorRef,
    activation::{ActivationOptions, gelu_tanh_and_mul, silu_and_mul},
    norm::rmsnorm,
    page::append_paged_kv_cache,
    rope::{RopeTensors, Rotation, apply_rope_pos_ids_cos_sin_cache},
};

use super::{
    buffers::{Buffers, SharedBuffers},
    network::{Network, Pass},
    products::SharedProducts,
    weights::{Layer, SharedExpert},
};
use crate::{Result, model::architecture::Activation};

impl Network {
    /// What attention makes of `x`: in `made` if that is normed, else in `x`.
    pub fn attention(&self, pass: &mut Pass<'_>, index: usize, layer: &Layer) -> Result<()> {
        let Pass { rows, padded_rows, tables, plans, products, .. } = *pass;
        let Buffers { x, made, qkv, qk, attention, scratch, .. } = &mut *pass.buffers;
        let (stream, heads) = (&self.stream, self.config.heads);
        let mut scratch = scratch.view_mut();
        let mut qkv = qkv.rows_mut(padded_rows)?;
        products.qkv.run(&mut qkv, &x.rows(padded_rows)?, &layer.qkv.view(), &mut scratch)?;
        let (mut q, kv) = qkv.narrow(0, 0, rows)?.split_at(1, heads.num_qo_heads)?;
        let (mut k, v) = kv.split_at(1, heads.num_kv_heads)?;
        if let (Some(qk), Some([q_norm, k_norm])) = (qk, &layer.qk_norm) {
            let options = self.widths.norm_options(self.config.rms_eps);
            let (mut normed_q, mut normed_k) = qk.rows_mut(rows)?.split_at(1, heads.num_qo_heads)?;
            rmsnorm(stream, &mut normed_q, &q.as_ref(), &q_norm.view(), &options)?;
            rmsnorm(stream, &mut normed_k, &k.as_ref(), &k_norm.view(), &options)?;
            (q, k) = (normed_q, normed_k);
        }
        let mut turned = RopeTensors::InPlace { q: q.reborrow(), k: k.reborrow() };
        let rope = self.ropes[self.config.layers[index].rope].view()?;
        let mut rotation = Rotation::new(rope, tables);
        rotation.interleave = self.config.architecture.interleave;
        apply_rope_pos_ids_cos_sin_cache(stream, &mut turned, &rotation)?;
        let mut cache = pass.cache.layer_mut(index)?;
        append_paged_kv_cache(stream, &k.as_ref(), &v.as_ref(), &tables.slots(), &mut cache)?;
        plans.run(index, &q.as_ref(), &pass.cache.layer(index)?, &mut attention.rows_mut(rows)?)?;
        let mut out = made.as_mut().unwrap_or(x).rows_mut(padded_rows)?;
        let attention = attention.rows(padded_rows)?;
        products.attention_output.run(&mut out, &attention, &layer.attention_output.view(), &mut scratch)
    }

    /// What the MLP, or experts, make of `x`: in `made` if that is normed, else in `x`.
    pub fn mlp(&self, pass: &mut Pass<'_>, layer: &Layer) -> Result<()> {
        let Pass { rows, padded_rows, products, .. } = *pass;
        let experts = self.config.num_experts();
        if let (Some(weights), Some(products)) = (&layer.shared, &products.shared) {
            self.shared_expert(pass, weights, products)?;
        }
        let Buffers { x, made, gate_up, inner, routing, shared, scratch, .. } = &mut *pass.buffers;
        let (mut scratch, input) = (scratch.view_mut(), x.rows(padded_rows)?);
        if let (Some(router), Some(product), Some(routing)) = (&layer.router, &products.router, &mut *routing)
        {
            let mut scores = routing.scores_mut(padded_rows)?;
            product.run(&mut scores, &input, &router.view(), &mut scratch)?;
            routing.choose(&self.kernels, rows)?;
        }
        let mut both = gate_up.rows_mut(padded_rows * experts)?;
        products.gate_up.run(&mut both, &input, &layer.gate_up.view(), &mut scratch)?;
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
        products.down.run(&mut out, &between, &layer.down.view(), &mut scratch)?;
        if let (Some(weights), Some(products), Some(shared)) = (&layer.shared, &products.shared, shared) {
            let inner = shared.inner.rows(padded_rows)?;
            products.down.run(&mut out, &inner, &weights.down.view(), &mut scratch)?;
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
        let Buffers { x, shared: Some(buffers), scratch, .. } = &mut *pass.buffers else {
            return Err("there is no memory for a shared expert".into());
        };
        let SharedBuffers { shares, gate_up, inner } = buffers;
        let (mut scratch, input) = (scratch.view_mut(), x.rows(padded_rows)?);
        let mut shares = shares.view_mut().narrow(0, 0, padded_rows)?;
        products.gate.run(&mut shares, &input, &weights.gate.view(), &mut scratch)?;
        self.kernels.sigmoid(&mut shares)?;
        let mut both = gate_up.rows_mut(padded_rows)?;
        products.gate_up.run(&mut both, &input, &weights.gate_up.view(), &mut scratch)?;
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
