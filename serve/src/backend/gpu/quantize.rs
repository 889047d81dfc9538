//! Rows of 8-bit floats with a scale each, and how they are made (`quantize.cu`).

use std::sync::Arc;

use cudarc::{
    driver::{CudaFunction, CudaStream, LaunchConfig, PushKernelArg},
    nvrtc::Ptx,
};
use flashinfer_rs::{DType, Device, Stream, TensorRef, gpu::Tensor};
use float8::F8E4M3;

use crate::{Result, backend::matmul::Factor};

#[cfg(test)]
mod tests;

/// Threads of a block, which has a row.
const THREADS: u32 = 512;
/// Numbers of 16 bits that a thread reads at once.
const VECTOR: usize = 8;

/// A matrix of `e4m3`, each of whose rows is multiplied by a scale.
pub struct QuantizedRows {
    numbers: Tensor<F8E4M3>,
    scales: Tensor<f32>,
}

impl QuantizedRows {
    /// Zeros: memory for up to `rows` rows and up to `numbers` numbers in all.
    pub fn zeros(stream: &Stream, rows: usize, numbers: usize) -> Result<Self> {
        Ok(Self { numbers: Tensor::zeros(stream, &[numbers])?, scales: Tensor::zeros(stream, &[rows])? })
    }

    /// The first rows, of so many numbers.
    pub fn rows(&self, rows: usize, width: usize) -> Result<Factor<'_>> {
        Ok(Factor {
            numbers: self.numbers.view().narrow(0, 0, rows * width)?,
            scales: Some(self.scales.view().narrow(0, 0, rows)?),
        })
    }

    /// All, as a factor of products.
    pub fn view(&self) -> Factor<'_> {
        Factor { numbers: self.numbers.view(), scales: Some(self.scales.view()) }
    }
}

/// The kernel of one element type, on one stream.
pub struct Quantizer {
    cuda: Arc<CudaStream>,
    dtype: DType,
    quantize_rows: CudaFunction,
}

impl Quantizer {
    /// Has it compiled for rows of `f16` or `bf16`.
    ///
    /// # Errors
    /// The GPU has no 8-bit floats: its compute capability is below 8.9.
    pub fn new(cuda: &Arc<CudaStream>, dtype: DType) -> Result<Self> {
        let module = cuda.context().load_module(Ptx::from_src(include_str!("quantize.ptx")))?;
        let quantize_rows = module.load_function(&format!("quantize_rows_{dtype}"))?;
        Ok(Self { cuda: cuda.clone(), dtype, quantize_rows })
    }

    /// Makes each of `rows` rows, which lie in contiguous memory of any shape, its scale
    /// times numbers of `e4m3`, of which the largest is 448. Numbers that are not finite make
    /// a row NaN where they are, or everywhere.
    pub fn quantize<'q>(
        &self,
        out: &'q mut QuantizedRows,
        x: &TensorRef<'_>,
        rows: usize,
    ) -> Result<Factor<'q>> {
        let width = x.numel().checked_div(rows).unwrap_or(0);
        let fits = x.dtype() == self.dtype
            && x.is_contiguous()
            && rows * width == x.numel()
            && width.is_multiple_of(VECTOR)
            && x.data_ptr().addr().is_multiple_of(2 * VECTOR)
            && x.device() == Device::Cuda(self.cuda.context().ordinal() as u32);
        if !fits {
            return Err(format!(
                "what is quantized is {x:?}; expected {rows} rows of {VECTOR}s of {}",
                self.dtype
            )
            .into());
        }
        let quantized = out.rows(rows, width)?;
        let (Some(scales), blocks) = (quantized.scales, u32::try_from(rows)?) else {
            return Err("there is no room for scales".into());
        };
        if x.numel() > 0 {
            let [to, scales, from] = [quantized.numbers, scales, *x].map(|tensor| tensor.data_ptr() as u64);
            let width = u32::try_from(width / VECTOR)?;
            let mut launch = self.cuda.launch_builder(&self.quantize_rows);
            launch.arg(&to).arg(&scales).arg(&from).arg(&width);
            let shape =
                LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
            // SAFETY: the kernel takes three addresses and a width in eights. Each block reads a
            // row and writes as many numbers and a scale, all of which are there; what it writes
            // is borrowed alone.
            unsafe { launch.launch(shape)? };
        }
        Ok(quantized)
    }
}
