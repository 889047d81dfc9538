//! Matrices as products take them.

use std::sync::Arc;

use candle_core::quantized::GgmlDType;

use super::{Matrix, packed::Packed};

/// A matrix `[rows, columns]` to multiply with: blocks are repacked, plain numbers stay in the
/// bytes of their file. Its size in memory is about that in the file.
#[derive(Debug)]
pub struct Weights(pub(crate) Storage);

#[derive(Debug)]
pub(crate) enum Storage {
    Packed(Packed),
    Plain(Plain),
}

/// A matrix of `F32`, `F16` or `BF16`.
#[derive(Debug)]
pub(crate) struct Plain {
    bytes: Arc<Vec<u8>>,
    dtype: GgmlDType,
    columns: usize,
}

impl Plain {
    pub fn matrix(&self) -> Matrix<'_> {
        Matrix::new(&self.bytes, self.dtype, self.columns).expect("its bytes were checked")
    }
}

impl Weights {
    /// A matrix of these bytes; `None` where [`Matrix::new`] has none.
    pub fn new(bytes: Arc<Vec<u8>>, dtype: GgmlDType, columns: usize) -> Option<Self> {
        let packed = Packed::new(Matrix::new(&bytes, dtype, columns)?);
        let plain = || Storage::Plain(Plain { bytes, dtype, columns });
        Some(Self(packed.map_or_else(plain, Storage::Packed)))
    }

    /// Its height.
    pub fn rows(&self) -> usize {
        match &self.0 {
            Storage::Packed(packed) => packed.rows,
            Storage::Plain(plain) => plain.matrix().rows(),
        }
    }

    /// Its width.
    pub fn columns(&self) -> usize {
        match &self.0 {
            Storage::Packed(packed) => packed.columns,
            Storage::Plain(plain) => plain.columns,
        }
    }

    /// The numbers of a row.
    ///
    /// # Panics
    /// There is no such row, or `numbers` are not as many as a row has.
    pub fn dequantize_row(&self, row: usize, numbers: &mut [f32]) {
        assert!(row < self.rows() && numbers.len() == self.columns());
        match &self.0 {
            Storage::Packed(packed) => packed.dequantize_row(row, numbers),
            Storage::Plain(plain) => plain.matrix().dequantize_row(row, numbers),
        }
    }
}
