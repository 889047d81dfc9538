//! Layers of few rows, in as few kernels as can be: norms, activations and sums are parts of products.
//! Sums over ranks follow them.

use flashinfer_rs::norm::rmsnorm;

use super::{
    buffers::Buffers,
    few_rows::{Fused, RowNorm},
    half::HalfTensor,
    multiplier::StepProduct,
    network::{Network, Pass},
    ranks::Ranks,
    weights::{Layer, Linear},
};
use crate::{Result, model::architecture::Activation};

impl Network {
    /// All layers and the last norm, whose results are in `x`; the residual is what the layers begin
    /// with. Their products are [fused](super::products::Products::fused).
    pub fn fused_layers(&self, pass: &mut Pass<'_>) -> Result<()> {
        for (index, layer) in self.weights.layers.iter().enumerate() {
            self.fused_layer(pass, index, layer)?;
        }
        let Buffers { residual, x, .. } = &mut *pass.buffers;
        let (mut x, residual) = (x.rows_mut(pass.rows)?, residual.rows(pass.rows)?);
        Ok(rmsnorm(&self.stream, &mut x, &residual, &self.weights.norm.view(), &self.residual_norm())?)
    }

    fn fused_layer(&self, pass: &mut Pass<'_>, index: usize, layer: &Layer) -> Result<()> {
        let Pass { padded_rows: rows, products, .. } = *pass;
        // Rank 0 alone adds the residual, which the sum over ranks then has once.
        let adds = self.ranks.as_ref().is_none_or(Ranks::is_first);
        let sum = Fused { sum: adds, ..Fused::default() };

        self.normed_product(pass, &products.qkv, None, &layer.attention_norm, &layer.qkv)?;
        self.attend(pass, index, layer)?;
        let Buffers { residual, attention, .. } = &mut *pass.buffers;
        let (mut out, x) = (residual.rows_mut(rows)?, attention.rows(rows)?);
        let weight = layer.attention_output.view();
        pass.multiplier.run_fused(&products.attention_output, &sum, &mut out, &x, &weight)?;
        self.sum(&mut out.narrow(0, 0, pass.rows)?)?;

        let activation = Some(self.config.activation);
        self.normed_product(pass, &products.gate_up, activation, &layer.mlp_norm, &layer.gate_up)?;
        let Buffers { residual, inner, .. } = &mut *pass.buffers;
        let (mut out, x) = (residual.rows_mut(rows)?, inner.rows(rows)?);
        pass.multiplier.run_fused(&products.down, &sum, &mut out, &x, &layer.down.view())?;
        self.sum(&mut out.narrow(0, 0, pass.rows)?)
    }

    /// A product of the normed residual: queries, keys and values, or with an activation what it makes of
    /// gates. The norm is a kernel of its own where rows are so many that it is better done once.
    fn normed_product(
        &self,
        pass: &mut Pass<'_>,
        product: &StepProduct,
        activation: Option<Activation>,
        norm: &HalfTensor,
        weight: &Linear,
    ) -> Result<()> {
        let (rows, options) = (pass.padded_rows, self.residual_norm());
        let Buffers { residual, x, qkv, inner, .. } = &mut *pass.buffers;
        let mut out = if activation.is_some() { inner } else { qkv }.rows_mut(rows)?;
        let residual = residual.rows(rows)?;
        if pass.multiplier.norms(product) {
            let norm = Some(RowNorm { weight: norm.view(), eps: options.eps });
            let fused = Fused { norm, activation, sum: false };
            return pass.multiplier.run_fused(product, &fused, &mut out, &residual, &weight.view());
        }
        rmsnorm(&self.stream, &mut x.rows_mut(rows)?, &residual, &norm.view(), &options)?;
        let fused = Fused { activation, ..Fused::default() };
        pass.multiplier.run_fused(product, &fused, &mut out, &x.rows(rows)?, &weight.view())
    }
}
