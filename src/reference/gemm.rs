//! Matrix products on the CPU.

use super::host::{FLOATS, HostCheck, Rows};
use crate::{
    dtype::DType,
    error::Result,
    gemm::{BmmFp8Input, GemmBackend, Problem, SegmentGemmInput, Sizes},
    indices::SegmentIndices,
    tensor::TensorMut,
};

/// Element types of products beside the wide ones.
const HALVES: [DType; 2] = [DType::F16, DType::BF16];

/// [`SegmentGemm::run`](crate::gemm::SegmentGemm::run) on the CPU.
///
/// Rows and weights are of any float type, and not of the same; the output is
/// `f16`, `bf16`, `f32` or `f64`.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument): a device,
/// dtype or shape does not fit, or `segments` is for another number of rows or
/// names a weight that there is not. Nothing was written.
pub fn segment_gemm(
    out: &mut TensorMut<'_>,
    input: &SegmentGemmInput<'_>,
    segments: &SegmentIndices,
) -> Result<()> {
    let check = HostCheck { op: "reference::segment_gemm" };
    // Sm90 takes all that Sm80 takes.
    check.as_kernel(|check| Sizes::check(check, GemmBackend::Sm90, &out.raw, input, segments))?;
    let x = check.rows("x", &input.x, &FLOATS, &[2])?;
    // One row for each column of a weight, whichever way it is stored.
    let weights = if input.weight_column_major { input.weights } else { swapped(check, input)? };
    let weights = check.rows("weights", &weights, &FLOATS, &[3])?;
    let (rows, k) = (x.shape()[0], x.shape()[1]);
    let (num_weights, n) = (weights.shape()[0], weights.shape()[1]);
    check.shape("weights", &weights, &[num_weights, n, k])?;
    let mut out = check.rows_mut("out", out, &HALVES, &[2])?;
    check.shape("out", &out.rows, &[rows, n])?;
    if segments.num_rows() as i64 != rows {
        let problem = format!("they have {} rows, the tensors have {rows}", segments.num_rows());
        return check.fail("segments", problem);
    }
    if segments.num_weights() as i64 > num_weights {
        let problem = format!("they need {} weights of {num_weights}", segments.num_weights());
        return check.fail("segments", problem);
    }
    for (range, weight) in segments.iter() {
        let product = product(&x, range.clone(), &weights, weight * n as usize, n as usize, 1.0);
        for (row, numbers) in range.zip(&product) {
            out.write(row, numbers);
        }
    }
    Ok(())
}

/// The weights with their last two dimensions exchanged.
fn swapped<'a>(check: HostCheck, input: &SegmentGemmInput<'a>) -> Result<crate::TensorRef<'a>> {
    if input.weights.rank() != 3 {
        let problem = format!("its shape is {:?}; expected three dimensions", input.weights.shape());
        return check.fail("weights", problem);
    }
    input.weights.permute(&[0, 2, 1])
}

/// [`gemm::bmm_fp8`](crate::gemm::bmm_fp8) on the CPU.
///
/// The factors are of any float type, in any layout; the output is `f16`,
/// `bf16`, `f32` or `f64`, the scales `f32` or `f64`.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument): a device, dtype
/// or shape does not fit. Nothing was written.
pub fn bmm_fp8(out: &mut TensorMut<'_>, input: &BmmFp8Input<'_>) -> Result<()> {
    let check = HostCheck { op: "reference::bmm_fp8" };
    check.as_kernel(|check| Problem::check(check, &out.raw, input))?;
    let a = check.rows("a", &input.a, &FLOATS, &[3])?;
    let b = check.rows("b", &input.b, &FLOATS, &[3])?;
    let (batch, m, k, n) = (a.shape()[0], a.shape()[1], a.shape()[2], b.shape()[2]);
    check.shape("b", &b, &[batch, k, n])?;
    let columns = input.b.permute(&[0, 2, 1])?;
    let b = check.rows("b", &columns, &FLOATS, &[3])?;
    let mut out = check.rows_mut("out", out, &HALVES, &[3])?;
    check.shape("out", &out.rows, &[batch, m, n])?;
    let mut scale = 1.0;
    for (name, tensor) in [("a_scale", &input.a_scale), ("b_scale", &input.b_scale)] {
        let one = check.rows(name, tensor, &[], &[1])?;
        check.shape(name, &one, &[1])?;
        scale *= one.numbers(0)[0];
    }
    let (m, n) = (m as usize, n as usize);
    for matrix in 0..batch as usize {
        let rows = matrix * m..(matrix + 1) * m;
        let product = product(&a, rows.clone(), &b, matrix * n, n, scale);
        for (row, numbers) in rows.zip(&product) {
            out.write(row, numbers);
        }
    }
    Ok(())
}

/// The products of some rows of `a` with `n` rows of `b` from `first` on, times
/// `scale`.
fn product(
    a: &Rows<'_>,
    rows: std::ops::Range<usize>,
    b: &Rows<'_>,
    first: usize,
    n: usize,
    scale: f64,
) -> Vec<Vec<f64>> {
    let left: Vec<_> = rows.map(|row| a.numbers(row)).collect();
    let mut product = vec![vec![0.0; n]; left.len()];
    if left.is_empty() {
        return product;
    }
    let mut right = vec![0.0; b.width()];
    for column in 0..n {
        b.read(first + column, &mut right);
        for (row, numbers) in left.iter().zip(&mut product) {
            let sum: f64 = row.iter().zip(&right).map(|(a, b)| a * b).sum();
            numbers[column] = scale * sum;
        }
    }
    product
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::testing::{refused, view, view_mut};

    /// Rows (1 2), (3 4), (5 6), and weights of two inputs and three outputs.
    const X: [f64; 6] = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
    const ROW_MAJOR: [f64; 12] = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 10.0, 0.0, 0.0, 0.0, 10.0, -1.0];
    const COLUMN_MAJOR: [f64; 12] = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 10.0, 0.0, 0.0, 10.0, 0.0, -1.0];

    fn segments(lens: &[usize], weights: &[usize]) -> SegmentIndices {
        SegmentIndices::from_lens(lens.iter().copied()).unwrap().with_weight_indices(weights).unwrap()
    }

    #[test]
    fn segments_use_their_weights() {
        let x = view(&X, &[3, 2]);
        for input in [
            SegmentGemmInput::row_major(x, view(&ROW_MAJOR, &[2, 2, 3])),
            SegmentGemmInput::column_major(x, view(&COLUMN_MAJOR, &[2, 3, 2])),
        ] {
            let mut out = [f64::NAN; 9];
            let lens = segments(&[1, 0, 2], &[0, 0, 1]);
            segment_gemm(&mut view_mut(&mut out, &[3, 3]), &input, &lens).unwrap();
            assert_eq!(out, [1.0, 2.0, 3.0, 30.0, 40.0, -4.0, 50.0, 60.0, -6.0]);
        }
    }

    #[test]
    fn wrong_segments_are_refused() {
        let input = SegmentGemmInput::row_major(view(&X, &[3, 2]), view(&ROW_MAJOR, &[2, 2, 3]));
        let mut out = [0.0f64; 9];
        let mut run = |input: &SegmentGemmInput<'_>, shape: &[usize], segments: &SegmentIndices| {
            segment_gemm(&mut view_mut(&mut out, shape), input, segments)
        };
        let good = segments(&[1, 2], &[1, 0]);
        refused(run(&input, &[3, 3], &segments(&[1, 1], &[1, 0])), "segments");
        refused(run(&input, &[3, 3], &segments(&[1, 2], &[2, 0])), "segments");
        refused(run(&input, &[3, 2], &good), "out");
        let flat = SegmentGemmInput { weights: view(&ROW_MAJOR, &[4, 3]), ..input };
        refused(run(&flat, &[3, 3], &good), "weights");
        let other = SegmentGemmInput { weight_column_major: true, ..input };
        refused(run(&other, &[3, 3], &good), "weights");
        run(&input, &[3, 3], &good).unwrap();
    }

    #[test]
    fn scales_multiply_products() {
        let scale = [0.5f32, 4.0];
        let input = BmmFp8Input {
            a: view(&X, &[1, 3, 2]),
            b: view(&COLUMN_MAJOR[..6], &[1, 3, 2]).permute(&[0, 2, 1]).unwrap(),
            a_scale: view(&scale[..1], &[1]),
            b_scale: view(&scale[1..], &[1]),
        };
        let mut out = [f64::NAN; 9];
        bmm_fp8(&mut view_mut(&mut out, &[1, 3, 3]), &input).unwrap();
        assert_eq!(out, [2.0, 4.0, 6.0, 6.0, 8.0, 14.0, 10.0, 12.0, 22.0]);
        // Two matrices of one row each.
        let input = BmmFp8Input {
            a: view(&X[..4], &[2, 1, 2]),
            b: view(&COLUMN_MAJOR, &[2, 3, 2]).permute(&[0, 2, 1]).unwrap(),
            ..input
        };
        let mut out = [f64::NAN; 6];
        bmm_fp8(&mut view_mut(&mut out, &[2, 1, 3]), &input).unwrap();
        assert_eq!(out, [2.0, 4.0, 6.0, 60.0, 80.0, -8.0]);
        refused(bmm_fp8(&mut view_mut(&mut out, &[1, 2, 3]), &input), "out");
        let both = BmmFp8Input { a_scale: view(&scale, &[2]), ..input };
        refused(bmm_fp8(&mut view_mut(&mut out, &[2, 1, 3]), &both), "a_scale");
    }
}
