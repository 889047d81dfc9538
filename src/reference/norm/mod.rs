//! Norms on the CPU.

mod fused_dit_layernorm;
mod fused_qk_rmsnorm_rope;
mod layernorm;
mod rmsnorm;

pub use fused_dit_layernorm::fused_dit_layernorm;
pub use fused_qk_rmsnorm_rope::fused_qk_rmsnorm_rope;
pub use layernorm::layernorm;
pub use rmsnorm::{
    fused_add_rmsnorm, fused_add_rmsnorm_quant, gemma_fused_add_rmsnorm, gemma_rmsnorm, rmsnorm,
    rmsnorm_quant,
};

use crate::{dtype::DType, error::Result, reference::host::HostCheck, tensor::TensorRef};

/// The numbers of a vector that all rows share.
fn vector(
    check: HostCheck,
    name: &'static str,
    tensor: &TensorRef<'_>,
    dtypes: &[DType],
    len: usize,
) -> Result<Vec<f64>> {
    let rows = check.rows(name, tensor, dtypes, &[1])?;
    check.shape(name, &rows, &[len as i64])?;
    Ok(rows.numbers(0))
}

/// Takes the mean off a row and divides it by its standard deviation.
fn standardize(row: &mut [f64], eps: f64) {
    let len = row.len() as f64;
    let mean = row.iter().sum::<f64>() / len;
    row.iter_mut().for_each(|x| *x -= mean);
    let factor = 1.0 / (row.iter().map(|x| x * x).sum::<f64>() / len + eps).sqrt();
    row.iter_mut().for_each(|x| *x *= factor);
}
