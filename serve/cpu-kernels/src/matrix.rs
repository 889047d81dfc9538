//! A matrix in the bytes of a file.

use candle_core::quantized::GgmlDType;
use pulp::{Arch, Simd, WithSimd};

use super::{
    format::{Block, Format},
    half::{bf16, f16},
};

/// A matrix `[rows, columns]`, row after row, in the bytes that a GGUF file has of it.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    bytes: &'a [u8],
    dtype: GgmlDType,
    columns: usize,
}

impl<'a> Matrix<'a> {
    /// A matrix of these bytes. `None` if its rows are no whole number of blocks, the bytes are
    /// no whole number of rows, or files have no matrices of this type.
    pub fn new(bytes: &'a [u8], dtype: GgmlDType, columns: usize) -> Option<Self> {
        let fits = columns > 0 && columns.is_multiple_of(dtype.block_size());
        let matrix = Self { bytes, dtype, columns };
        (fits && bytes.len().is_multiple_of(matrix.row_bytes()) && matrix.has_numbers()).then_some(matrix)
    }

    /// Its height.
    pub fn rows(&self) -> usize {
        self.bytes.len() / self.row_bytes()
    }

    /// Its width.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// What its blocks are, if it has some.
    pub(crate) fn format(&self) -> Option<Format> {
        Format::of(self.dtype)
    }

    /// The bytes of a row.
    pub(crate) fn row(&self, row: usize) -> &'a [u8] {
        &self.bytes[row * self.row_bytes()..][..self.row_bytes()]
    }

    /// Bytes of a row.
    fn row_bytes(&self) -> usize {
        self.columns / self.dtype.block_size() * self.dtype.type_size()
    }

    /// The numbers of a row.
    ///
    /// # Panics
    /// There is no such row, or `numbers` are not as many as a row has.
    pub fn dequantize_row(&self, row: usize, numbers: &mut [f32]) {
        assert_eq!(numbers.len(), self.columns);
        Arch::new().dispatch(Row { bytes: self.row(row), dtype: self.dtype, numbers });
    }

    /// [`dequantize_row`](Self::dequantize_row), where vector instructions are chosen already.
    #[inline(always)]
    pub(crate) fn decode(&self, row: usize, numbers: &mut [f32]) {
        decode(self.dtype, self.row(row), numbers);
    }

    fn has_numbers(&self) -> bool {
        !matches!(self.dtype, GgmlDType::Q8_1 | GgmlDType::Q8K)
    }
}

/// A row, and where its numbers go.
struct Row<'a> {
    bytes: &'a [u8],
    dtype: GgmlDType,
    numbers: &'a mut [f32],
}

impl WithSimd for Row<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        decode(self.dtype, self.bytes, self.numbers);
    }
}

/// The numbers of a row.
#[inline(always)]
fn decode(dtype: GgmlDType, row: &[u8], numbers: &mut [f32]) {
    match dtype {
        GgmlDType::F32 => {
            for (number, bytes) in numbers.iter_mut().zip(row.as_chunks().0) {
                *number = f32::from_le_bytes(*bytes);
            }
        }
        GgmlDType::F16 => {
            for (number, bytes) in numbers.iter_mut().zip(row.as_chunks().0) {
                *number = f16(u16::from_le_bytes(*bytes));
            }
        }
        GgmlDType::BF16 => {
            for (number, bytes) in numbers.iter_mut().zip(row.as_chunks().0) {
                *number = bf16(u16::from_le_bytes(*bytes));
            }
        }
        _ => {
            // `new` refuses types without a format.
            let Some(format) = Format::of(dtype) else { unreachable!("no type of matrices") };
            let mut block = Block::new();
            let blocks = row.chunks_exact(dtype.type_size());
            for (bytes, numbers) in blocks.zip(numbers.chunks_exact_mut(format.len())) {
                format.read(bytes, &mut block);
                block.dequantize(&format, numbers);
            }
        }
    }
}
