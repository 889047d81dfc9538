//! Products of rows and weights.

use candle_core::{Device, Tensor};

use crate::{
    Result,
    model::weights::{Linear, Matrix},
};

/// `x · weightᵀ` for rows `x`.
pub fn multiply(x: &Tensor, Matrix(weight): &Matrix) -> Result<Vec<f32>> {
    Ok(x.apply_op1_no_bwd(weight.as_ref())?.flatten_all()?.to_vec1()?)
}

/// `x · weightᵀ + bias` for rows `x`.
pub fn linear(x: &Tensor, Linear { parts, bias }: &Linear) -> Result<Vec<f32>> {
    let out: usize = parts.iter().map(Matrix::rows).sum();
    let rows = x.dim(0)?;
    let mut product = match &parts[..] {
        [whole] => multiply(x, whole)?,
        parts => {
            let mut joined = vec![0.0; rows * out];
            let mut start = 0;
            for part in parts {
                let width = part.rows();
                let values = multiply(x, part)?;
                for (to, from) in joined.chunks_exact_mut(out).zip(values.chunks_exact(width)) {
                    to[start..start + width].copy_from_slice(from);
                }
                start += width;
            }
            joined
        }
    };
    if let Some(bias) = bias {
        for row in product.chunks_exact_mut(out) {
            row.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
        }
    }
    Ok(product)
}

/// Rows of so many numbers.
pub fn rows(values: Vec<f32>, width: usize) -> Result<Tensor> {
    let len = values.len();
    Ok(Tensor::from_vec(values, (len / width, width), &Device::Cpu)?)
}
