//! Products with matrices that stay in the types of their file.
//!
//! A thread takes a few rows of a matrix at a time, makes them `f32` in its cache, and multiplies
//! all rows of activations by them. Whatever is computed beside it, a number of the product is
//! the sum of the same products in the same order: a request's answer does not depend on the
//! batch that it is in.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::Matrix;

/// Rows of a matrix that are multiplied side by side.
const PANEL: usize = 4;
/// What rows in `f32` are filled up to, with zeros: a multiple of the numbers of a vector.
const ALIGNMENT: usize = 16;
/// Numbers of a matrix that are worth a task of its own.
const TASK: usize = 1 << 16;
/// Rows of a product that are made of columns at a time: numbers of a cache line.
const TRANSPOSED: usize = 16;

/// `x · matrixᵀ` for rows `x`, `[count, columns]`, and several matrices, one beside the other:
/// `[count, rows of all]`.
///
/// # Panics
/// A matrix is not as wide as the others, or `x` is no whole number of rows.
pub fn multiply(x: &[f32], matrices: &[Matrix<'_>]) -> Vec<f32> {
    let Some(columns) = matrices.first().map(Matrix::columns) else { return Vec::new() };
    assert!(matrices.iter().all(|matrix| matrix.columns() == columns) && x.len().is_multiple_of(columns));
    let (count, rows) = (x.len() / columns, matrices.iter().map(Matrix::rows).sum::<usize>());
    let padded;
    let x = match columns.is_multiple_of(ALIGNMENT) {
        true => x,
        false => {
            padded = pad(x, columns);
            &padded
        }
    };
    let rows_of_task = (TASK / columns).max(1).next_multiple_of(PANEL);
    let mut product = vec![0.0; count * rows];
    if product.is_empty() {
        return product;
    }
    // Columns of the product, one after the other.
    let (mut tasks, mut rest) = (Vec::new(), &mut product[..]);
    for matrix in matrices.iter().flat_map(|matrix| matrix.chunks(rows_of_task)) {
        let out = rest.split_off_mut(..matrix.rows() * count).expect("a column for each row");
        tasks.push(Task { matrix, x, count, out });
    }
    let arch = Arch::new();
    tasks.into_par_iter().for_each(|task| arch.dispatch(task));
    if count == 1 { product } else { transpose(&product, count) }
}

/// Rows, filled up with zeros.
fn pad(x: &[f32], columns: usize) -> Vec<f32> {
    let width = columns.next_multiple_of(ALIGNMENT);
    let mut padded = vec![0.0; x.len() / columns * width];
    for (to, from) in padded.chunks_exact_mut(width).zip(x.chunks_exact(columns)) {
        to[..columns].copy_from_slice(from);
    }
    padded
}

/// A product's rows, one after the other, of its columns.
fn transpose(columns: &[f32], count: usize) -> Vec<f32> {
    let rows = columns.len() / count;
    let mut product = vec![0.0; columns.len()];
    product.par_chunks_mut(TRANSPOSED * rows).enumerate().for_each(|(part, out)| {
        for (row, column) in columns.chunks_exact(count).enumerate() {
            let column = &column[part * TRANSPOSED..];
            for (out, number) in out.chunks_exact_mut(rows).zip(column) {
                out[row] = *number;
            }
        }
    });
    product
}

/// Rows `x`, filled up to `ALIGNMENT`, and rows of a matrix. Of each of the latter, `out` takes
/// the products with all of the former.
struct Task<'a> {
    matrix: Matrix<'a>,
    x: &'a [f32],
    count: usize,
    out: &'a mut [f32],
}

impl WithSimd for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { matrix, x, count, out } = self;
        let width = x.len() / count;
        let mut panel = vec![0.0; PANEL * width];
        for (index, out) in out.chunks_mut(PANEL * count).enumerate() {
            for (row, numbers) in panel.chunks_exact_mut(width).take(out.len() / count).enumerate() {
                matrix.decode(PANEL * index + row, &mut numbers[..matrix.columns()]);
            }
            for row in (0..count - count % 2).step_by(2) {
                write(simd, out, count, row, dots::<S, 2>(simd, &x[row * width..], &panel, width));
            }
            if count % 2 == 1 {
                let row = count - 1;
                write(simd, out, count, row, dots::<S, 1>(simd, &x[row * width..], &panel, width));
            }
        }
    }
}

/// The products of the first rows of `x` with each row of a panel, before the numbers of a vector
/// are added up.
#[inline(always)]
fn dots<S: Simd, const X: usize>(simd: S, x: &[f32], panel: &[f32], width: usize) -> [[S::f32s; PANEL]; X] {
    let len = width / S::F32_LANES;
    let (mut rows, mut weights) = ([&[][..]; X], [&[][..]; PANEL]);
    for (index, row) in rows.iter_mut().enumerate() {
        *row = &S::as_simd_f32s(&x[index * width..][..width]).0[..len];
    }
    for (index, row) in weights.iter_mut().enumerate() {
        *row = &S::as_simd_f32s(&panel[index * width..][..width]).0[..len];
    }
    let mut sums = [[simd.splat_f32s(0.0); PANEL]; X];
    for at in 0..len {
        for (sums, row) in sums.iter_mut().zip(rows) {
            for (sum, weights) in sums.iter_mut().zip(weights) {
                *sum = simd.mul_add_e_f32s(row[at], weights[at], *sum);
            }
        }
    }
    sums
}

/// Adds the numbers of vectors up, and writes them as the rows from `row` on of a panel's columns.
#[inline(always)]
fn write<S: Simd, const X: usize>(
    simd: S,
    columns: &mut [f32],
    count: usize,
    row: usize,
    sums: [[S::f32s; PANEL]; X],
) {
    for (index, sums) in sums.into_iter().enumerate() {
        for (column, sum) in columns.chunks_exact_mut(count).zip(sums) {
            column[row + index] = simd.reduce_sum_f32s(sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{
        Device, Tensor,
        quantized::{GgmlDType, QTensor},
    };

    use super::*;

    const DTYPES: [GgmlDType; 13] = [
        GgmlDType::F32,
        GgmlDType::F16,
        GgmlDType::BF16,
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q8_0,
        GgmlDType::Q2K,
        GgmlDType::Q3K,
        GgmlDType::Q4K,
        GgmlDType::Q5K,
        GgmlDType::Q6K,
    ];

    fn random(rows: usize, columns: usize) -> Tensor {
        Tensor::randn(0f32, 1.0, (rows, columns), &Device::Cpu).unwrap()
    }

    fn numbers(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn numbers_are_those_of_candle() {
        for dtype in DTYPES {
            let quantized = QTensor::quantize(&random(5, 768), dtype).unwrap();
            let bytes = quantized.data().unwrap();
            let matrix = Matrix::new(&bytes, dtype, 768).unwrap();
            let expected = numbers(&quantized.dequantize(&Device::Cpu).unwrap());
            let mut row = vec![f32::NAN; 768];
            for (index, expected) in expected.chunks_exact(768).enumerate() {
                matrix.dequantize_row(index, &mut row);
                assert_eq!(row, expected, "{dtype:?}");
            }
        }
    }

    /// Of two matrices, whose heights are no multiples of anything.
    #[test]
    fn a_row_has_the_same_product_alone_and_among_others() {
        for dtype in DTYPES {
            let columns = if dtype.block_size() == 1 { 523 } else { 512 };
            let of = |rows| QTensor::quantize(&random(rows, columns), dtype).unwrap();
            let (first, second) = (of(203), of(6));
            let bytes = [&first, &second].map(|matrix| matrix.data().unwrap().into_owned());
            let matrices = [0, 1].map(|index| Matrix::new(&bytes[index], dtype, columns).unwrap());
            let x = random(19, columns);
            let x = numbers(&x);
            let together = multiply(&x, &matrices);
            for (x, row) in x.chunks_exact(columns).zip(together.chunks_exact(209)) {
                assert_eq!(multiply(x, &matrices), row, "{dtype:?}");
            }
            let five = multiply(&x[3 * columns..8 * columns], &matrices[1..]);
            for (row, five) in together[3 * 209..].chunks_exact(209).zip(five.chunks_exact(6)) {
                assert_eq!(&row[203..], five, "{dtype:?}");
            }
            let weights = [first, second].map(|matrix| numbers(&matrix.dequantize(&Device::Cpu).unwrap()));
            let weights = weights.concat();
            let expected = x.chunks_exact(columns).flat_map(|x| {
                let dot = |row: &[f32]| row.iter().zip(x).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                weights.chunks_exact(columns).map(dot).collect::<Vec<f64>>()
            });
            for (number, expected) in together.iter().zip(expected) {
                assert!((f64::from(*number) - expected).abs() < 1e-3, "{dtype:?}: {number}, {expected}");
            }
        }
    }

    #[test]
    fn a_matrix_has_whole_rows_of_whole_blocks() {
        assert!(Matrix::new(&[0; 36], GgmlDType::Q4_0, 64).is_some());
        assert!(Matrix::new(&[0; 36], GgmlDType::Q4_0, 48).is_none());
        assert!(Matrix::new(&[0; 37], GgmlDType::Q4_0, 64).is_none());
        assert!(Matrix::new(&[0; 36], GgmlDType::Q8_1, 32).is_none());
        assert!(Matrix::new(&[], GgmlDType::F32, 0).is_none());
        let empty = Matrix::new(&[], GgmlDType::F32, 3).unwrap();
        assert!(multiply(&[1.0; 6], &[empty]).is_empty() && multiply(&[], &[]).is_empty());
        let one = [1f32.to_le_bytes(); 3].concat();
        let one = Matrix::new(&one, GgmlDType::F32, 3).unwrap();
        assert_eq!(multiply(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[one, empty]), [6.0, 15.0]);
        // Rows of more numbers than a task has.
        let long = 1f32.to_le_bytes().repeat(5 * 2 * TASK);
        let long = Matrix::new(&long, GgmlDType::F32, 2 * TASK).unwrap();
        assert_eq!(multiply(&vec![1.0; 2 * 2 * TASK], &[long]), [2.0 * TASK as f32; 10]);
        assert!(multiply(&[], &[one]).is_empty());
    }
}
