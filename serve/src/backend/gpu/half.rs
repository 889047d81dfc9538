//! Tensors of the 16-bit floats that a model computes in: `f16`, or `bf16`.

use flashinfer_rs::{DType, FlashInferError, Result, Stream, TensorMut, TensorRef, gpu::Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

use super::ranks::Registered;

/// A tensor on the GPU of one of the two.
pub enum HalfTensor {
    F16(Tensor<f16>),
    Bf16(Tensor<bf16>),
    /// Of either, in memory that all ranks reach.
    Registered(Registered),
}

impl HalfTensor {
    /// A tensor of zeros.
    pub fn zeros(stream: &Stream, dtype: DType, shape: &[usize]) -> Result<Self> {
        match dtype {
            DType::F16 => Tensor::zeros(stream, shape).map(Self::F16),
            DType::BF16 => Tensor::zeros(stream, shape).map(Self::Bf16),
            other => Err(unsupported(other)),
        }
    }

    /// A tensor of numbers in row-major order, rounded.
    pub fn rounded(stream: &Stream, dtype: DType, shape: &[usize], numbers: &[f32]) -> Result<Self> {
        match dtype {
            DType::F16 => {
                let rounded: Vec<_> = numbers.par_iter().map(|&number| f16::from_f32(number)).collect();
                Tensor::from_slice(stream, shape, &rounded).map(Self::F16)
            }
            DType::BF16 => {
                let rounded: Vec<_> = numbers.par_iter().map(|&number| bf16::from_f32(number)).collect();
                Tensor::from_slice(stream, shape, &rounded).map(Self::Bf16)
            }
            other => Err(unsupported(other)),
        }
    }

    /// The tensor, to read.
    pub fn view(&self) -> TensorRef<'_> {
        match self {
            Self::F16(tensor) => tensor.view(),
            Self::Bf16(tensor) => tensor.view(),
            Self::Registered(tensor) => tensor.view(),
        }
    }

    /// The tensor, to write.
    pub fn view_mut(&mut self) -> TensorMut<'_> {
        match self {
            Self::F16(tensor) => tensor.view_mut(),
            Self::Bf16(tensor) => tensor.view_mut(),
            Self::Registered(tensor) => tensor.view_mut(),
        }
    }

    /// Its first `rows` rows, to read.
    pub fn rows(&self, rows: usize) -> Result<TensorRef<'_>> {
        self.view().narrow(0, 0, rows)
    }

    /// Its first `rows` rows, to write.
    pub fn rows_mut(&mut self, rows: usize) -> Result<TensorMut<'_>> {
        self.view_mut().narrow(0, 0, rows)
    }
}

/// The smallest number that is rounded to infinity.
pub fn overflow(dtype: DType) -> f32 {
    match dtype {
        DType::F16 => 65520.0,
        // Half a step above the largest number of `bf16`.
        _ => f32::from_bits(0x7f7f_8000),
    }
}

fn unsupported(dtype: DType) -> FlashInferError {
    FlashInferError::Unsupported {
        what: format!("a model in {dtype}"),
        available: "the GPU computes in f16 and bf16".into(),
    }
}

#[cfg(test)]
mod tests {
    use cudarc::driver::result::memcpy_dtoh_sync;

    use super::*;

    impl HalfTensor {
        /// Its numbers. Those of registered memory are to be written by now.
        pub fn to_f64(&self) -> Vec<f64> {
            match self {
                Self::F16(tensor) => tensor.to_vec().unwrap().into_iter().map(f64::from).collect(),
                Self::Bf16(tensor) => tensor.to_vec().unwrap().into_iter().map(f64::from).collect(),
                Self::Registered(tensor) => {
                    let view = tensor.view();
                    let mut bits = vec![0u16; view.numel()];
                    // SAFETY: so many numbers of two bytes are there.
                    unsafe { memcpy_dtoh_sync(&mut bits, view.data_ptr() as u64) }.unwrap();
                    let number = |bits| match view.dtype() {
                        DType::F16 => f16::from_bits(bits).to_f64(),
                        _ => bf16::from_bits(bits).to_f64(),
                    };
                    bits.into_iter().map(number).collect()
                }
            }
        }
    }

    #[test]
    fn numbers_below_the_overflow_are_finite() {
        let below = |limit: f32| f32::from_bits(limit.to_bits() - 1);
        let [f16_limit, bf16_limit] = [DType::F16, DType::BF16].map(overflow);
        assert!(f16::from_f32(below(f16_limit)).is_finite() && f16::from_f32(f16_limit).is_infinite());
        assert!(bf16::from_f32(below(bf16_limit)).is_finite() && bf16::from_f32(bf16_limit).is_infinite());
    }
}
