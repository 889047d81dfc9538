//! A matrix in the bytes of a file.

use candle_core::quantized::GgmlDType;
use pulp::{Arch, Simd, WithSimd};

use super::{blocks, k_blocks};

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

    /// Bytes of a row.
    pub(crate) fn row_bytes(&self) -> usize {
        self.columns / self.dtype.block_size() * self.dtype.type_size()
    }

    /// The same of some of its rows, as many at a time as are given.
    pub(crate) fn chunks(self, rows: usize) -> impl ExactSizeIterator<Item = Self> {
        self.bytes.chunks(rows * self.row_bytes()).map(move |bytes| Self { bytes, ..self })
    }

    /// The numbers of a row.
    ///
    /// # Panics
    /// There is no such row, or `numbers` are not as many as a row has.
    pub fn dequantize_row(&self, row: usize, numbers: &mut [f32]) {
        let bytes = &self.bytes[row * self.row_bytes()..][..self.row_bytes()];
        assert_eq!(numbers.len(), self.columns);
        Arch::new().dispatch(Row { bytes, dtype: self.dtype, numbers });
    }

    /// [`dequantize_row`](Self::dequantize_row), where vector instructions are chosen already.
    #[inline(always)]
    pub(crate) fn decode(&self, row: usize, numbers: &mut [f32]) {
        decode(self.dtype, &self.bytes[row * self.row_bytes()..][..self.row_bytes()], numbers);
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
        GgmlDType::F32 => blocks::decode::<_, _, blocks::F32>(row, numbers),
        GgmlDType::F16 => blocks::decode::<_, _, blocks::F16>(row, numbers),
        GgmlDType::BF16 => blocks::decode::<_, _, blocks::Bf16>(row, numbers),
        GgmlDType::Q4_0 => blocks::decode::<_, _, blocks::Q4_0>(row, numbers),
        GgmlDType::Q4_1 => blocks::decode::<_, _, blocks::Q4_1>(row, numbers),
        GgmlDType::Q5_0 => blocks::decode::<_, _, blocks::Q5_0>(row, numbers),
        GgmlDType::Q5_1 => blocks::decode::<_, _, blocks::Q5_1>(row, numbers),
        GgmlDType::Q8_0 => blocks::decode::<_, _, blocks::Q8_0>(row, numbers),
        GgmlDType::Q2K => blocks::decode::<_, _, k_blocks::Q2K>(row, numbers),
        GgmlDType::Q3K => blocks::decode::<_, _, k_blocks::Q3K>(row, numbers),
        GgmlDType::Q4K => blocks::decode::<_, _, k_blocks::Q4K>(row, numbers),
        GgmlDType::Q5K => blocks::decode::<_, _, k_blocks::Q5K>(row, numbers),
        GgmlDType::Q6K => blocks::decode::<_, _, k_blocks::Q6K>(row, numbers),
        // Types of activations: `new` refuses them.
        GgmlDType::Q8_1 | GgmlDType::Q8K => unreachable!("no type of matrices"),
    }
}
