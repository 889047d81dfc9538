//! Heads as wide as attention kernels are compiled for.
//!
//! Models have heads of other widths, too. On the GPU they are filled up with zeros,
//! which add nothing to queries times keys, and whose values nobody reads: weights
//! make them, and the norms of heads are told.

use candle_core::Tensor;
use flashinfer_rs::norm::NormOptions;

use crate::{Result, model::Config};

/// The widths of heads that FlashInfer's attention kernels are compiled for.
const HEAD_DIMS: [usize; 3] = [64, 128, 256];

/// The widths of a model's heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadWidths {
    /// That of the model.
    pub model: usize,
    /// That on the GPU.
    pub padded: usize,
}

impl HeadWidths {
    /// # Errors
    /// The model's are wider than all that there are kernels for.
    pub fn new(config: &Config) -> Result<Self> {
        let model = config.head_dim;
        match HEAD_DIMS.into_iter().find(|&padded| padded >= model) {
            Some(padded) => Ok(Self { model, padded }),
            None => Err(format!(
                "its heads have {model} dimensions; attention kernels of the GPU have up to {}",
                HEAD_DIMS[HEAD_DIMS.len() - 1]
            )
            .into()),
        }
    }

    /// A matrix or vector whose rows make heads, with rows of zeros.
    pub fn pad_rows(self, tensor: &Tensor) -> Result<Tensor> {
        let (heads, columns) = (tensor.dim(0)? / self.model, tensor.elem_count() / tensor.dim(0)?);
        let heads = tensor.reshape((heads, self.model, columns))?;
        let padded = heads.pad_with_zeros(1, 0, self.padded - self.model)?;
        Ok(padded.reshape(((), columns))?)
    }

    /// A matrix whose columns are multiplied by heads, with columns of zeros.
    pub fn pad_columns(self, tensor: &Tensor) -> Result<Tensor> {
        let (rows, columns) = tensor.dims2()?;
        let heads = tensor.reshape((rows, columns / self.model, self.model))?;
        let padded = heads.pad_with_zeros(2, 0, self.padded - self.model)?;
        Ok(padded.reshape((rows, ()))?)
    }

    /// The weight of a norm of heads. The kernel divides the sum of squares by the
    /// padded width, which makes its results larger by the root of the widths' ratio.
    pub fn pad_norm(self, weight: &[f32]) -> Vec<f32> {
        let factor = self.ratio().sqrt() as f32;
        let mut padded: Vec<_> = weight.iter().map(|weight| weight * factor).collect();
        padded.resize(self.padded, 0.0);
        padded
    }

    /// The options of such a norm.
    pub fn norm_options(self, eps: f64) -> NormOptions {
        NormOptions::with_eps(eps * self.ratio())
    }

    fn ratio(self) -> f64 {
        self.model as f64 / self.padded as f64
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    const WIDTHS: HeadWidths = HeadWidths { model: 2, padded: 3 };

    fn matrix(rows: usize, columns: usize) -> Tensor {
        let numbers = (0..rows * columns).map(|at| at as f32 + 1.0).collect();
        Tensor::from_vec(numbers, (rows, columns), &Device::Cpu).unwrap()
    }

    #[test]
    fn heads_are_filled_up_with_zeros() {
        let rows = WIDTHS.pad_rows(&matrix(4, 2)).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(rows, [[1.0, 2.0], [3.0, 4.0], [0.0; 2], [5.0, 6.0], [7.0, 8.0], [0.0; 2]]);
        let columns = WIDTHS.pad_columns(&matrix(2, 4)).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(columns, [[1.0, 2.0, 0.0, 3.0, 4.0, 0.0], [5.0, 6.0, 0.0, 7.0, 8.0, 0.0]]);
    }

    #[test]
    fn a_norm_of_a_padded_head_is_that_of_the_head() {
        let (head, weight, eps) = ([3.0f64, -4.0], [0.5f32, 2.0], 0.25);
        let norm = |width: usize, eps: f64, weight: f64, number: f64| {
            number / (head.iter().map(|number| number * number).sum::<f64>() / width as f64 + eps).sqrt()
                * weight
        };
        let padded = WIDTHS.pad_norm(&weight);
        assert_eq!((padded.len(), padded[2]), (3, 0.0));
        for at in 0..2 {
            let wanted = norm(2, eps, weight[at].into(), head[at]);
            let got = norm(3, WIDTHS.norm_options(eps).eps, padded[at].into(), head[at]);
            assert!((wanted - got).abs() < 1e-6, "{wanted} {got}");
        }
    }
}
