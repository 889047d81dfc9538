//! A matrix in the type in which a file holds it.

use std::{fmt, ops::Range, sync::Arc};

use candle_core::{
    CpuStorage, Device, Tensor,
    quantized::{GgmlDType, QTensor, QuantizedType},
};
use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

use crate::Result;

/// Numbers that are made `f32` at a time, to multiply: those of a processor's
/// cache.
const WIDENED: usize = 1 << 16;

/// A matrix `[out, in]`, row after row. Clones share it.
#[derive(Clone)]
pub struct Matrix {
    values: Arc<Values>,
    rows: usize,
    columns: usize,
}

enum Values {
    F32(Tensor),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    Quantized(Box<dyn QuantizedType>),
}

impl Matrix {
    /// A matrix of these bytes.
    ///
    /// # Errors
    /// They are not as many as a matrix of this shape has, or its rows are no
    /// whole number of blocks.
    pub fn from_bytes(bytes: &[u8], dtype: GgmlDType, [rows, columns]: [usize; 2]) -> Result<Self> {
        let expected = rows * columns / dtype.block_size() * dtype.type_size();
        if bytes.len() != expected || !columns.is_multiple_of(dtype.block_size()) {
            let shape = format!("[{rows}, {columns}] of {dtype:?}");
            return Err(format!("{} bytes for {shape}; expected {expected}", bytes.len()).into());
        }
        let pairs = || bytes.chunks_exact(2).map(|pair| [pair[0], pair[1]]);
        let values = match dtype {
            GgmlDType::F32 => {
                let numbers = bytes
                    .chunks_exact(4)
                    .map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]]));
                Values::F32(Tensor::from_vec(numbers.collect(), (rows, columns), &Device::Cpu)?)
            }
            GgmlDType::F16 => Values::F16(pairs().map(f16::from_le_bytes).collect()),
            GgmlDType::BF16 => Values::Bf16(pairs().map(bf16::from_le_bytes).collect()),
            dtype => {
                // Aligned for every type of block.
                let mut aligned = vec![0u64; bytes.len().div_ceil(8)];
                let aligned = &mut bytemuck::cast_slice_mut(&mut aligned)[..bytes.len()];
                aligned.copy_from_slice(bytes);
                Values::Quantized(dtype.from_data((&*aligned).into()))
            }
        };
        Ok(Self { values: Arc::new(values), rows, columns })
    }

    /// A matrix of numbers, `[out, in]`, in `dtype`.
    pub fn new(tensor: &Tensor, dtype: GgmlDType) -> Result<Self> {
        let (rows, columns) = tensor.dims2()?;
        Self::from_bytes(&QTensor::quantize(tensor, dtype)?.data()?, dtype, [rows, columns])
    }

    /// Its height, `out`.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Its width, `in`.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Its numbers, `[out, in]`, in `f32`.
    pub fn dequantize(&self) -> Result<Tensor> {
        let shape = (self.rows, self.columns);
        Ok(match &*self.values {
            Values::F32(tensor) => tensor.clone(),
            Values::F16(numbers) => Tensor::from_vec(numbers.to_f32_vec(), shape, &Device::Cpu)?,
            Values::Bf16(numbers) => Tensor::from_vec(numbers.to_f32_vec(), shape, &Device::Cpu)?,
            Values::Quantized(blocks) => {
                let numbers = f32_numbers(blocks.dequantize(self.rows * self.columns)?)?;
                Tensor::from_vec(numbers, shape, &Device::Cpu)?
            }
        })
    }

    /// Some of its rows, in this order.
    ///
    /// # Errors
    /// There is no such row.
    pub fn gather(&self, rows: &[u32]) -> Result<Vec<f32>> {
        if let Some(row) = rows.iter().find(|&&row| row as usize >= self.rows) {
            return Err(format!("there is no token {row}; expected one below {}", self.rows).into());
        }
        let range = |row: u32| row as usize * self.columns..(row as usize + 1) * self.columns;
        Ok(match &*self.values {
            Values::F32(tensor) => {
                tensor.index_select(&Tensor::new(rows, &Device::Cpu)?, 0)?.flatten_all()?.to_vec1()?
            }
            Values::F16(numbers) => rows.iter().flat_map(|&row| numbers[range(row)].to_f32_vec()).collect(),
            Values::Bf16(numbers) => rows.iter().flat_map(|&row| numbers[range(row)].to_f32_vec()).collect(),
            Values::Quantized(blocks) => f32_numbers(blocks.embedding(rows, self.rows, self.columns)?)?,
        })
    }

    /// `x · matrixᵀ` for rows `x` of `in` numbers: `out` numbers for each.
    pub fn multiply(&self, x: &[f32]) -> Result<Vec<f32>> {
        let count = x.len() / self.columns;
        match &*self.values {
            Values::F32(tensor) => {
                let x = Tensor::from_slice(x, (count, self.columns), &Device::Cpu)?;
                Ok(x.matmul(&tensor.t()?)?.flatten_all()?.to_vec1()?)
            }
            Values::F16(numbers) => self.widened(x, |rows| Ok(numbers[self.range(rows)].to_f32_vec())),
            Values::Bf16(numbers) => self.widened(x, |rows| Ok(numbers[self.range(rows)].to_f32_vec())),
            // candle's own product would round `x` to 8 bits, which changes answers.
            Values::Quantized(blocks) => self.widened(x, |rows| {
                let rows: Vec<_> = rows.map(|row| row as u32).collect();
                f32_numbers(blocks.embedding(&rows, self.rows, self.columns)?)
            }),
        }
    }

    /// Where the numbers of rows are.
    fn range(&self, rows: Range<usize>) -> Range<usize> {
        rows.start * self.columns..rows.end * self.columns
    }

    /// A product with a few rows at a time, which `wide` gives in `f32`.
    fn widened(&self, x: &[f32], wide: impl Fn(Range<usize>) -> Result<Vec<f32>> + Sync) -> Result<Vec<f32>> {
        let count = x.len() / self.columns;
        let x = Tensor::from_slice(x, (count, self.columns), &Device::Cpu)?;
        let step = (WIDENED / self.columns).max(1);
        let part = |index: usize| -> Result<Vec<f32>> {
            let rows = index * step..self.rows.min((index + 1) * step);
            let part = Tensor::from_vec(wide(rows.clone())?, (rows.len(), self.columns), &Device::Cpu)?;
            Ok(x.matmul(&part.t()?)?.flatten_all()?.to_vec1()?)
        };
        let parts: Vec<_> = (0..self.rows.div_ceil(step)).into_par_iter().map(part).collect::<Result<_>>()?;
        let mut product = vec![0.0; count * self.rows];
        for (index, part) in parts.iter().enumerate() {
            let rows = part.len() / count;
            for (to, from) in product.chunks_exact_mut(self.rows).zip(part.chunks_exact(rows)) {
                to[index * step..][..rows].copy_from_slice(from);
            }
        }
        Ok(product)
    }
}

impl fmt::Debug for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dtype = match &*self.values {
            Values::F32(_) => GgmlDType::F32,
            Values::F16(_) => GgmlDType::F16,
            Values::Bf16(_) => GgmlDType::BF16,
            Values::Quantized(blocks) => blocks.dtype(),
        };
        write!(f, "Matrix[{}, {}] of {dtype:?}", self.rows, self.columns)
    }
}

/// The numbers of dequantized blocks.
fn f32_numbers(storage: CpuStorage) -> Result<Vec<f32>> {
    match storage {
        CpuStorage::F32(numbers) => Ok(numbers),
        _ => Err("dequantized blocks are not in f32".into()),
    }
}
