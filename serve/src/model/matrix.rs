//! A matrix in the type in which a file holds it.

use std::{fmt, sync::Arc};

use candle_core::{
    Device, Tensor,
    quantized::{GgmlDType, QTensor},
};
use flashinfer_cpu_kernels as kernels;
use rayon::prelude::*;

use crate::Result;

/// A matrix `[out, in]`, row after row, in the bytes of its file. Clones share them.
#[derive(Clone)]
pub struct Matrix {
    bytes: Arc<Vec<u8>>,
    dtype: GgmlDType,
    rows: usize,
    columns: usize,
}

impl Matrix {
    /// A matrix of these bytes.
    ///
    /// # Errors
    /// They are not as many as a matrix of this shape has, or its rows are no
    /// whole number of blocks.
    pub fn from_bytes(bytes: Vec<u8>, dtype: GgmlDType, [rows, columns]: [usize; 2]) -> Result<Self> {
        let expected = rows * columns / dtype.block_size() * dtype.type_size();
        if bytes.len() != expected || kernels::Matrix::new(&bytes, dtype, columns).is_none() {
            let shape = format!("[{rows}, {columns}] of {dtype:?}");
            return Err(format!("{} bytes for {shape}; expected {expected}", bytes.len()).into());
        }
        Ok(Self { bytes: Arc::new(bytes), dtype, rows, columns })
    }

    /// A matrix of numbers, `[out, in]`, in `dtype`.
    pub fn new(tensor: &Tensor, dtype: GgmlDType) -> Result<Self> {
        let (rows, columns) = tensor.dims2()?;
        Self::from_bytes(QTensor::quantize(tensor, dtype)?.data()?.into_owned(), dtype, [rows, columns])
    }

    /// Its height, `out`.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Its width, `in`.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The matrix as it is in its file.
    fn view(&self) -> kernels::Matrix<'_> {
        kernels::Matrix::new(&self.bytes, self.dtype, self.columns).expect("its bytes were checked")
    }

    /// Its numbers, `[out, in]`, in `f32`.
    pub fn dequantize(&self) -> Result<Tensor> {
        let mut numbers = vec![0.0; self.rows * self.columns];
        self.dequantize_to(&mut numbers);
        Ok(Tensor::from_vec(numbers, (self.rows, self.columns), &Device::Cpu)?)
    }

    /// Writes its numbers, `out · in` of them, to `numbers`.
    pub fn dequantize_to(&self, numbers: &mut [f32]) {
        let view = self.view();
        let rows = numbers.par_chunks_exact_mut(self.columns).enumerate();
        rows.for_each(|(row, numbers)| view.dequantize_row(row, numbers));
    }

    /// The matrix to multiply with on the CPU.
    pub fn pack(&self) -> kernels::Weights {
        kernels::Weights::new(self.bytes.clone(), self.dtype, self.columns).expect("its bytes were checked")
    }
}

impl fmt::Debug for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Matrix[{}, {}] of {:?}", self.rows, self.columns, self.dtype)
    }
}
