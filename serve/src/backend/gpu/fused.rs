//! Layers of few rows, in as few kernels as can be: norms, activations and sums are parts of products.

use flashinfer_rs::norm::rmsnorm;

use super::{
    buffers::Buffers,
    few_rows::{Fused, RowNorm},
    network::{Network, Pass},
    weights::Layer,
};
use crate::Result;

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
        let eps = self.residual_norm().eps;
        let [attention_norm, mlp_norm] =
            [&layer.attention_norm, &layer.mlp_norm].map(|norm| Some(RowNorm { weight: norm.view(), eps }));
        let sum = Fused { sum: true, ..Fused::default() };

        let Buffers { residual, qkv, .. } = &mut *pass.buffers;
        let fused = Fused { norm: attention_norm, ..Fused::default() };
        let (mut out, x) = (qkv.rows_mut(rows)?, residual.rows(rows)?);
        pass.multiplier.run_fused(&products.qkv, &fused, &mut out, &x, &layer.qkv.view())?;

        self.attend(pass, index, layer)?;
        let Buffers { residual, attention, .. } = &mut *pass.buffers;
        let (mut out, x) = (residual.rows_mut(rows)?, attention.rows(rows)?);
        pass.multiplier.run_fused(
            &products.attention_output,
            &sum,
            &mut out,
            &x,
            &layer.attention_output.view(),
        )?;

        let Buffers { residual, inner, .. } = &mut *pass.buffers;
        let activation = Some(self.config.activation);
        let fused = Fused { norm: mlp_norm, activation, ..Fused::default() };
        let (mut out, x) = (inner.rows_mut(rows)?, residual.rows(rows)?);
        pass.multiplier.run_fused(&products.gate_up, &fused, &mut out, &x, &layer.gate_up.view())?;

        let (mut out, x) = (residual.rows_mut(rows)?, inner.rows(rows)?);
        pass.multiplier.run_fused(&products.down, &sum, &mut out, &x, &layer.down.view())
    }
}
