//! The choice of the fastest kernels for the products of a step.

use flashinfer_rs::{TensorMut, TensorRef};

use super::{
    buffers::{Buffers, Outputs, Products},
    network::Network,
};
use crate::{
    Result,
    backend::matmul::{Matmul, Weight},
};

/// Takes the fastest kernel for a product with each of these weights.
fn tune<'w>(
    product: &mut Matmul,
    mut out: TensorMut<'_>,
    x: &TensorRef<'_>,
    weights: impl Iterator<Item = Weight<'w>> + Clone,
    scratch: &mut TensorMut<'_>,
) -> Result<()> {
    product.tune(|product| weights.clone().try_for_each(|weight| product.run(&mut out, x, &weight, scratch)))
}

impl Network {
    /// Takes the fastest kernels for the products of all layers. What is in the
    /// buffers is lost.
    pub fn tune(&self, products: &mut Products, buffers: &mut Buffers, rows: usize) -> Result<()> {
        let Buffers { x, qkv, attention, gate_up, inner, routing, scratch, .. } = buffers;
        let layers = self.weights.layers.iter();
        let (scratch, experts) = (&mut scratch.view_mut(), self.config.num_experts());
        let weights = layers.clone().map(|layer| layer.qkv.view());
        tune(&mut products.qkv, qkv.rows_mut(rows)?, &x.rows(rows)?, weights, scratch)?;
        let weights = layers.clone().map(|layer| layer.attention_output.view());
        tune(&mut products.attention_output, x.rows_mut(rows)?, &attention.rows(rows)?, weights, scratch)?;
        let weights = layers.clone().map(|layer| layer.gate_up.view());
        tune(&mut products.gate_up, gate_up.rows_mut(rows * experts)?, &x.rows(rows)?, weights, scratch)?;
        let weights = layers.clone().map(|layer| layer.down.view());
        tune(&mut products.down, x.rows_mut(rows)?, &inner.rows(rows * experts)?, weights, scratch)?;
        if let (Some(product), Some(routing)) = (&mut products.router, routing) {
            let weights = layers.filter_map(|layer| layer.router.as_ref()).map(|router| router.view());
            tune(product, routing.scores_mut(rows)?, &x.rows(rows)?, weights, scratch)?;
        }
        Ok(())
    }

    /// Takes the fastest kernel for the product that makes logits.
    pub fn tune_head(
        &self,
        product: &mut Matmul,
        buffers: &mut Buffers,
        outputs: &mut Outputs,
        rows: usize,
    ) -> Result<()> {
        let logits = outputs.logits.view_mut().narrow(0, 0, rows)?;
        let weights = std::iter::once(self.weights.head());
        tune(product, logits, &buffers.x.rows(rows)?, weights, &mut buffers.scratch.view_mut())
    }
}
