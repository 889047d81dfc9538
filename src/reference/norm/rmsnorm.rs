//! RMS norms on the CPU.

use super::vector;
use crate::{
    dtype::DType,
    error::Result,
    norm::{self, NormOptions},
    reference::host::{HostCheck, Rows},
    tensor::{TensorMut, TensorRef},
};

/// Element types of the norms beside the wide ones.
const DTYPES: [DType; 2] = [DType::F16, DType::BF16];
/// Element types of quantized results beside the wide ones.
const QUANTIZED: [DType; 2] = [DType::E4M3, DType::E5M2];

/// [`norm::rmsnorm`](crate::norm::rmsnorm) on the CPU: `input` and `out` are
/// `[rows, d]` or `[rows, heads, d]`, `weight` is `[d]`.
///
/// Each tensor is `f16`, `bf16`, `f32` or `f64`; the two 16-bit types do not mix.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument): a device,
/// dtype or shape does not fit. Nothing was written.
pub fn rmsnorm(
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    weight: &TensorRef<'_>,
    options: &NormOptions,
) -> Result<()> {
    norm(HostCheck { op: "reference::rmsnorm" }, &[2, 3], 0.0, out, input, weight, options)
}

/// [`norm::gemma_rmsnorm`](crate::norm::gemma_rmsnorm) on the CPU: [`rmsnorm`]
/// with `weight + 1`; `input` and `out` are `[rows, d]`.
///
/// # Errors
/// As [`rmsnorm`].
pub fn gemma_rmsnorm(
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    weight: &TensorRef<'_>,
    options: &NormOptions,
) -> Result<()> {
    norm(HostCheck { op: "reference::gemma_rmsnorm" }, &[2], 1.0, out, input, weight, options)
}

/// [`norm::fused_add_rmsnorm`](crate::norm::fused_add_rmsnorm) on the CPU:
/// `residual += input`, then `input = rmsnorm(residual) · weight`. Both are
/// `[rows, d]` and written; `weight` is `[d]`.
///
/// As in the kernel, the sum is taken in `f32` (in `f64` if both tensors are),
/// rounded where it is stored as the residual, and normed unrounded.
///
/// # Errors
/// As [`rmsnorm`].
pub fn fused_add_rmsnorm(
    input: &mut TensorMut<'_>,
    residual: &mut TensorMut<'_>,
    weight: &TensorRef<'_>,
    options: &NormOptions,
) -> Result<()> {
    fused_add(HostCheck { op: "reference::fused_add_rmsnorm" }, 0.0, input, residual, weight, options)
}

/// [`norm::gemma_fused_add_rmsnorm`](crate::norm::gemma_fused_add_rmsnorm) on
/// the CPU: [`fused_add_rmsnorm`] with `weight + 1`.
///
/// # Errors
/// As [`rmsnorm`].
pub fn gemma_fused_add_rmsnorm(
    input: &mut TensorMut<'_>,
    residual: &mut TensorMut<'_>,
    weight: &TensorRef<'_>,
    options: &NormOptions,
) -> Result<()> {
    fused_add(HostCheck { op: "reference::gemma_fused_add_rmsnorm" }, 1.0, input, residual, weight, options)
}

/// The largest `e4m3`, at which quantized results are cut off.
const QUANTIZED_MAX: f64 = 448.0;

/// [`norm::rmsnorm_quant`](crate::norm::rmsnorm_quant) on the CPU: [`rmsnorm`]
/// of `[rows, d]`, divided by the number in `scale`, `[1]`, and cut off at ±448.
///
/// `out` is `e4m3`, `e5m2`, `f32` or `f64`, `scale` is `f32` or `f64`. NaN becomes
/// 448, as in the kernel of FlashInfer 0.6.13.
///
/// # Errors
/// As [`rmsnorm`].
pub fn rmsnorm_quant(
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    weight: &TensorRef<'_>,
    scale: &TensorRef<'_>,
    options: &NormOptions,
) -> Result<()> {
    let check = HostCheck { op: "reference::rmsnorm_quant" };
    check
        .as_kernel(|check| norm::check_rmsnorm_quant(check, &out.raw, &input.raw, &weight.raw, &scale.raw))?;
    let input = check.rows("input", input, &DTYPES, &[2])?;
    let mut out = check.rows_mut("out", out, &QUANTIZED, &[2])?;
    let weight = check.rows("weight", weight, &DTYPES, &[1])?;
    check_all(check, ("input", &input), ("out", &out.rows), &weight)?;
    let (weight, scale) = (weight.numbers(0), vector(check, "scale", scale, &[], 1)?[0]);
    for at in 0..input.count() {
        let mut row = input.numbers(at);
        normalize(&mut row, &weight, options.eps);
        quantize(&mut row, scale);
        out.write(at, &row);
    }
    Ok(())
}

/// [`norm::fused_add_rmsnorm_quant`](crate::norm::fused_add_rmsnorm_quant) on the
/// CPU: `residual += input`, then [`rmsnorm_quant`] of the sum, which is rounded
/// as [`fused_add_rmsnorm`] does.
///
/// # Errors
/// As [`rmsnorm`].
pub fn fused_add_rmsnorm_quant(
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    residual: &mut TensorMut<'_>,
    weight: &TensorRef<'_>,
    scale: &TensorRef<'_>,
    options: &NormOptions,
) -> Result<()> {
    let check = HostCheck { op: "reference::fused_add_rmsnorm_quant" };
    check.as_kernel(|check| {
        let rows = [&input.raw, &residual.raw];
        norm::check_fused_add_rmsnorm_quant(check, &out.raw, rows, &weight.raw, &scale.raw)
    })?;
    let input = check.rows("input", input, &DTYPES, &[2])?;
    let mut residual = check.rows_mut("residual", residual, &DTYPES, &[2])?;
    let mut out = check.rows_mut("out", out, &QUANTIZED, &[2])?;
    let weight = check.rows("weight", weight, &DTYPES, &[1])?;
    check_all(check, ("input", &input), ("residual", &residual.rows), &weight)?;
    check.shape("out", &out.rows, input.shape())?;
    let (weight, scale) = (weight.numbers(0), vector(check, "scale", scale, &[], 1)?[0]);
    for at in 0..input.count() {
        let mut row = sum(&input, &residual.rows, at);
        residual.write(at, &row);
        normalize(&mut row, &weight, options.eps);
        quantize(&mut row, scale);
        out.write(at, &row);
    }
    Ok(())
}

fn quantize(row: &mut [f64], scale: f64) {
    for x in row {
        let quotient = *x / scale;
        *x = if quotient.is_nan() { QUANTIZED_MAX } else { quotient.clamp(-QUANTIZED_MAX, QUANTIZED_MAX) };
    }
}

fn norm(
    check: HostCheck,
    ranks: &[usize],
    bias: f64,
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    weight: &TensorRef<'_>,
    options: &NormOptions,
) -> Result<()> {
    check.as_kernel(|check| norm::check_rmsnorm(check, &out.raw, &input.raw, &weight.raw, ranks))?;
    let input = check.rows("input", input, &DTYPES, ranks)?;
    let mut out = check.rows_mut("out", out, &DTYPES, ranks)?;
    let weight = check.rows("weight", weight, &DTYPES, &[1])?;
    check_all(check, ("input", &input), ("out", &out.rows), &weight)?;
    let weight = biased(&weight, bias);
    let mut row = vec![0.0; input.width()];
    for at in 0..input.count() {
        input.read(at, &mut row);
        normalize(&mut row, &weight, options.eps);
        out.write(at, &row);
    }
    Ok(())
}

fn fused_add(
    check: HostCheck,
    bias: f64,
    input: &mut TensorMut<'_>,
    residual: &mut TensorMut<'_>,
    weight: &TensorRef<'_>,
    options: &NormOptions,
) -> Result<()> {
    check
        .as_kernel(|check| norm::check_fused_add_rmsnorm(check, [&input.raw, &residual.raw], &weight.raw))?;
    let mut input = check.rows_mut("input", input, &DTYPES, &[2])?;
    let mut residual = check.rows_mut("residual", residual, &DTYPES, &[2])?;
    let weight = check.rows("weight", weight, &DTYPES, &[1])?;
    check_all(check, ("input", &input.rows), ("residual", &residual.rows), &weight)?;
    let weight = biased(&weight, bias);
    for at in 0..input.rows.count() {
        let mut row = sum(&input.rows, &residual.rows, at);
        residual.write(at, &row);
        normalize(&mut row, &weight, options.eps);
        input.write(at, &row);
    }
    Ok(())
}

/// The sum of two rows: in `f64` if both tensors are, else in `f32`.
fn sum(input: &Rows<'_>, residual: &Rows<'_>, at: usize) -> Vec<f64> {
    let wide = input.dtype() == DType::F64 && residual.dtype() == DType::F64;
    let add = |(x, y): (f64, f64)| if wide { x + y } else { f64::from(x as f32 + y as f32) };
    input.numbers(at).into_iter().zip(residual.numbers(at)).map(add).collect()
}

/// The first tensor decides the shape; the weight has its width; not both
/// 16-bit types occur.
fn check_all(
    check: HostCheck,
    (name, first): (&'static str, &Rows<'_>),
    second: (&'static str, &Rows<'_>),
    weight: &Rows<'_>,
) -> Result<()> {
    if first.width() == 0 {
        return check
            .fail(name, format!("its shape is {:?}; the last dimension must not be 0", first.shape()));
    }
    check.shape(second.0, second.1, first.shape())?;
    check.shape("weight", weight, &[first.width() as i64])?;
    let mut narrow = None;
    for (name, tensor) in [(name, first), second, ("weight", weight)] {
        if DTYPES.contains(&tensor.dtype()) && *narrow.get_or_insert(tensor.dtype()) != tensor.dtype() {
            return check.fail(name, "f16 and bf16 tensors do not mix".into());
        }
    }
    Ok(())
}

fn biased(weight: &Rows<'_>, bias: f64) -> Vec<f64> {
    weight.numbers(0).into_iter().map(|weight| weight + bias).collect()
}

/// Divides a row by its root mean square and multiplies it by `weight`.
pub(super) fn normalize(row: &mut [f64], weight: &[f64], eps: f64) {
    let mean_square = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
    let factor = 1.0 / (mean_square + eps).sqrt();
    for (x, weight) in row.iter_mut().zip(weight) {
        *x *= factor * weight;
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use proptest::prelude::*;

    use super::*;
    use crate::{
        Device,
        reference::testing::{refused, view, view_mut},
    };

    // The root mean square of (1, 7) is 5, that of (1, -1) is 1.
    const INPUT: [f64; 4] = [1.0, 7.0, 1.0, -1.0];
    const WEIGHT: [f64; 2] = [0.5, 2.0];

    #[test]
    fn rmsnorm_by_hand() {
        let mut out = [f64::NAN; 4];
        let options = NormOptions::with_eps(0.0);
        rmsnorm(&mut view_mut(&mut out, &[2, 2]), &view(&INPUT, &[2, 2]), &view(&WEIGHT, &[2]), &options)
            .unwrap();
        assert_eq!(out, [0.1, 2.8000000000000003, 0.5, -2.0]);
        // The same as two heads of one row.
        let mut heads = [f64::NAN; 4];
        let (shape, weight) = ([1, 2, 2], view(&WEIGHT, &[2]));
        rmsnorm(&mut view_mut(&mut heads, &shape), &view(&INPUT, &shape), &weight, &options).unwrap();
        assert_eq!(heads, out);
        // With eps 11: 25 + 11 = 6².
        let options = NormOptions::with_eps(11.0);
        rmsnorm(&mut view_mut(&mut out, &[1, 2]), &view(&INPUT, &[1, 2]), &weight, &options).unwrap();
        assert!((out[0] - 0.5 / 6.0).abs() < 1e-15 && (out[1] - 14.0 / 6.0).abs() < 1e-15);
    }

    #[test]
    fn gemma_adds_one_to_the_weight() {
        let mut out = [f64::NAN; 4];
        let options = NormOptions::with_eps(0.0);
        let (input, weight) = (view(&INPUT, &[2, 2]), view(&WEIGHT, &[2]));
        gemma_rmsnorm(&mut view_mut(&mut out, &[2, 2]), &input, &weight, &options).unwrap();
        let expected = [0.3, 4.2, 1.5, -3.0];
        assert!(out.iter().zip(expected).all(|(out, expected)| (out - expected).abs() < 1e-15), "{out:?}");
        refused(
            gemma_rmsnorm(&mut view_mut(&mut out, &[2, 1, 2]), &view(&INPUT, &[2, 1, 2]), &weight, &options),
            "input",
        );
    }

    #[test]
    fn fused_add_rounds_the_stored_sum_only() {
        // 2048 + 1 is not an f16, so 2048 is stored, but 2049 is normed.
        let mut input = [1.0f64, 3.0];
        let mut residual = [f16::from_f64(2048.0), f16::ZERO];
        let weight = [1.0f64; 2];
        fused_add_rmsnorm(
            &mut view_mut(&mut input, &[1, 2]),
            &mut view_mut(&mut residual, &[1, 2]),
            &view(&weight, &[2]),
            &NormOptions::with_eps(0.0),
        )
        .unwrap();
        assert_eq!(residual, [f16::from_f64(2048.0), f16::from_f64(3.0)]);
        let rms = ((2049.0f64.powi(2) + 9.0) / 2.0).sqrt();
        assert!((input[1] - 3.0 / rms).abs() < 1e-12 && (input[0] - 2049.0 / rms).abs() < 1e-12);

        let (mut input, mut residual) = ([0.5f64, 3.5], [0.5f64, 3.5]);
        gemma_fused_add_rmsnorm(
            &mut view_mut(&mut input, &[1, 2]),
            &mut view_mut(&mut residual, &[1, 2]),
            &view(&WEIGHT, &[2]),
            &NormOptions::with_eps(0.0),
        )
        .unwrap();
        assert_eq!(residual, [1.0, 7.0]);
        assert!((input[0] - 0.3).abs() < 1e-15 && (input[1] - 4.2).abs() < 1e-15);
    }

    #[test]
    fn quantized_results_are_divided_and_cut_off() {
        use float8::{F8E4M3, F8E5M2};
        let options = NormOptions::with_eps(0.0);
        let (input, weight) = (view(&INPUT, &[2, 2]), view(&WEIGHT, &[2]));
        let quarter = [0.25f64];
        let mut out = [F8E4M3::ZERO; 4];
        rmsnorm_quant(&mut view_mut(&mut out, &[2, 2]), &input, &weight, &view(&quarter, &[1]), &options)
            .unwrap();
        // 0.4, 11.2, 2 and −8, with 3 bits of mantissa.
        assert_eq!(out, [0.40625, 11.0, 2.0, -8.0].map(F8E4M3::from_f64));

        let mut residual = [0.0f32, 0.0, 0.0, f32::NAN];
        let mut out = [F8E5M2::ZERO; 4];
        let tiny = [1e-4f64];
        fused_add_rmsnorm_quant(
            &mut view_mut(&mut out, &[2, 2]),
            &input,
            &mut view_mut(&mut residual, &[2, 2]),
            &weight,
            &view(&tiny, &[1]),
            &options,
        )
        .unwrap();
        assert_eq!(out, [F8E5M2::from_f64(448.0); 4]);
        assert_eq!(residual[..3], [1.0, 7.0, 1.0]);

        let mut halves = [f16::ZERO; 4];
        let mut refuse = |scale, expected| {
            let mut out = view_mut(&mut halves, &[2, 2]);
            refused(rmsnorm_quant(&mut out, &input, &weight, &scale, &options), expected);
        };
        refuse(view(&quarter, &[1]), "out");
        let mut out = [0.0f64; 4];
        let mut out = view_mut(&mut out, &[2, 2]);
        refused(rmsnorm_quant(&mut out, &input, &weight, &view(&WEIGHT, &[2]), &options), "scale");
    }

    #[test]
    fn wrong_input_is_refused_and_nothing_written() {
        let options = NormOptions::default();
        let mut out = [7.0f32; 4];
        let (input, weight) = (view(&INPUT, &[2, 2]), view(&WEIGHT, &[2]));
        refused(rmsnorm(&mut view_mut(&mut out, &[1, 2]), &input, &weight, &options), "out");
        refused(rmsnorm(&mut view_mut(&mut out, &[2, 2]), &input, &view(&WEIGHT, &[1]), &options), "weight");
        refused(rmsnorm(&mut view_mut(&mut out, &[4]), &view(&INPUT, &[4]), &weight, &options), "input");
        refused(
            rmsnorm(&mut view_mut(&mut out, &[2, 0]), &view(&INPUT, &[2, 0]), &view(&WEIGHT, &[0]), &options),
            "input",
        );
        let (halves, brains, integers) = ([f16::ONE; 4], [bf16::ONE; 2], [1i32; 4]);
        refused(
            rmsnorm(
                &mut view_mut(&mut out, &[2, 2]),
                &view(&halves, &[2, 2]),
                &view(&brains, &[2]),
                &options,
            ),
            "weight",
        );
        refused(
            rmsnorm(&mut view_mut(&mut out, &[2, 2]), &view(&integers, &[2, 2]), &weight, &options),
            "input",
        );
        // SAFETY: the tensor is refused, so nothing looks at the address.
        let device = unsafe {
            TensorRef::from_raw_parts(256 as *const _, Device::Cuda(0), DType::F32, &[2, 2], None).unwrap()
        };
        refused(rmsnorm(&mut view_mut(&mut out, &[2, 2]), &device, &weight, &options), "input");
        let mut input = INPUT;
        refused(
            fused_add_rmsnorm(
                &mut view_mut(&mut input, &[2, 2]),
                &mut view_mut(&mut out, &[4, 1]),
                &weight,
                &options,
            ),
            "residual",
        );
        assert_eq!((out, input), ([7.0; 4], INPUT));
        // No rows are nothing to do.
        rmsnorm(&mut view_mut(&mut out, &[0, 2]), &view(&INPUT, &[0, 2]), &weight, &options).unwrap();
        assert_eq!(out, [7.0; 4]);
    }

    proptest! {
        /// Scaling the input changes nothing but the effect of eps, and the
        /// result has root mean square 1.
        #[test]
        fn norm_is_scale_free(
            mut row in prop::collection::vec(-8.0f64..8.0, 1..40),
            scale in 0.1f64..10.0,
        ) {
            row[0] += 9.0; // not all zero
            let d = row.len();
            let (ones, options) = (vec![1.0f64; d], NormOptions::with_eps(0.0));
            let (mut out, mut scaled_out) = (vec![f64::NAN; d], vec![f64::NAN; d]);
            let scaled: Vec<f64> = row.iter().map(|x| x * scale).collect();
            let weight = view(&ones, &[d]);
            rmsnorm(&mut view_mut(&mut out, &[1, d]), &view(&row, &[1, d]), &weight, &options).unwrap();
            rmsnorm(&mut view_mut(&mut scaled_out, &[1, d]), &view(&scaled, &[1, d]), &weight, &options)
                .unwrap();
            let mean_square = out.iter().map(|x| x * x).sum::<f64>() / d as f64;
            prop_assert!((mean_square - 1.0).abs() < 1e-12);
            for (a, b) in out.iter().zip(&scaled_out) {
                prop_assert!((a - b).abs() < 1e-12);
            }
        }

        /// Strides change where numbers lie, not what they are; fused addition
        /// of zero is the plain norm.
        #[test]
        fn strided_equals_contiguous(
            rows in 0usize..5,
            d in 1usize..20,
            gap in 0usize..5,
            seed in prop::collection::vec(-8.0f32..8.0, 200),
        ) {
            let options = NormOptions::default();
            let weight = &seed[150..150 + d];
            let weight = view(weight, &[d]);
            let input = view(&seed, &[rows, d]);
            let mut out = vec![f32::NAN; rows * d];
            rmsnorm(&mut view_mut(&mut out, &[rows, d]), &input, &weight, &options).unwrap();

            let stride = d + gap;
            let (mut spread, mut spread_out) = (vec![f32::NAN; rows * stride], vec![7.0f32; rows * stride]);
            for (to, from) in spread.chunks_mut(stride).zip(seed.chunks(d)) {
                to[..d].copy_from_slice(from);
            }
            let strides = [stride, 1];
            let view_in = TensorRef::from_slice_strided(&spread, &[rows, d], Some(&strides)).unwrap();
            rmsnorm(
                &mut TensorMut::from_slice_strided(&mut spread_out, &[rows, d], Some(&strides)).unwrap(),
                &view_in,
                &weight,
                &options,
            )
            .unwrap();
            for (spread, out) in spread_out.chunks(stride).zip(out.chunks(d)) {
                prop_assert_eq!(&spread[..d], out);
                prop_assert!(spread[d..].iter().all(|&x| x == 7.0));
            }

            let (mut fused, mut residual) = (seed[..rows * d].to_vec(), vec![0.0f32; rows * d]);
            fused_add_rmsnorm(
                &mut view_mut(&mut fused, &[rows, d]),
                &mut view_mut(&mut residual, &[rows, d]),
                &weight,
                &options,
            )
            .unwrap();
            prop_assert_eq!(&fused, &out);
            prop_assert_eq!(&residual[..], &seed[..rows * d]);
        }
    }
}
