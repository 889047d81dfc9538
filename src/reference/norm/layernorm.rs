//! The layer norm on the CPU.

use super::{standardize, vector};
use crate::{
    dtype::DType,
    error::Result,
    norm::{NormOptions, check_layernorm},
    reference::host::HostCheck,
    tensor::{TensorMut, TensorRef},
};

/// [`norm::layernorm`](crate::norm::layernorm) on the CPU: `input` and `out` are
/// `[rows, d]`, `gamma` and `beta` are `[d]`.
///
/// Input and output are `bf16`, `f32` or `f64`, the others `f32` or `f64`.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument): a device,
/// dtype or shape does not fit. Nothing was written.
pub fn layernorm(
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    gamma: &TensorRef<'_>,
    beta: &TensorRef<'_>,
    options: &NormOptions,
) -> Result<()> {
    let check = HostCheck { op: "reference::layernorm" };
    check.as_kernel(|check| check_layernorm(check, &out.raw, &input.raw, [&gamma.raw, &beta.raw]))?;
    let input = check.rows("input", input, &[DType::BF16], &[2])?;
    let mut out = check.rows_mut("out", out, &[DType::BF16], &[2])?;
    if input.width() == 0 {
        return check.fail("input", "its last dimension is 0".into());
    }
    check.shape("out", &out.rows, input.shape())?;
    let gamma = vector(check, "gamma", gamma, &[], input.width())?;
    let beta = vector(check, "beta", beta, &[], input.width())?;
    for at in 0..input.count() {
        let mut row = input.numbers(at);
        standardize(&mut row, options.eps);
        for (x, (gamma, beta)) in row.iter_mut().zip(gamma.iter().zip(&beta)) {
            *x = *x * gamma + beta;
        }
        out.write(at, &row);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::reference::testing::{refused, view, view_mut};

    #[test]
    fn layernorm_by_hand() {
        // Mean 4 and standard deviation 3; then a row that does not vary.
        let input = [1.0f64, 7.0, 5.0, 5.0];
        let mut out = [f64::NAN; 4];
        let (gamma, beta) = ([2.0f64, 0.5], [10.0f64, 20.0]);
        layernorm(
            &mut view_mut(&mut out, &[2, 2]),
            &view(&input, &[2, 2]),
            &view(&gamma, &[2]),
            &view(&beta, &[2]),
            &NormOptions::default(),
        )
        .unwrap();
        let expected = [8.0, 20.5, 10.0, 20.0];
        assert!(out.iter().zip(expected).all(|(out, expected)| (out - expected).abs() < 1e-6), "{out:?}");
    }

    #[test]
    fn wrong_input_is_refused() {
        let (numbers, halves) = ([1.0f32; 6], [half::f16::ONE; 6]);
        let good = view(&numbers, &[2, 3]);
        let vector = view(&numbers[..3], &[3]);
        let run = |input, gamma, beta, expected| {
            let mut out = [7.0f32; 6];
            let mut out = view_mut(&mut out, &[2, 3]);
            refused(layernorm(&mut out, &input, &gamma, &beta, &NormOptions::default()), expected);
        };
        run(view(&halves, &[2, 3]), vector, vector, "input");
        run(view(&numbers, &[6]), vector, vector, "input");
        run(view(&numbers, &[2, 0]), vector, vector, "input");
        run(view(&numbers, &[3, 2]), vector, vector, "out");
        run(good, view(&numbers, &[2]), vector, "gamma");
        run(good, vector, view(&halves[..3], &[3]), "beta");
    }

    proptest! {
        /// Adding to a row and scaling it changes nothing; the result has mean
        /// 0 and variance 1.
        #[test]
        fn layernorm_forgets_mean_and_scale(
            mut row in prop::collection::vec(-8.0f64..8.0, 2..40),
            scale in 0.1f64..10.0,
            added in -10.0f64..10.0,
        ) {
            row[0] += 20.0; // not all the same
            let d = row.len();
            let (ones, zeros) = (vec![1.0f64; d], vec![0.0f64; d]);
            let (mut out, mut other_out) = (vec![f64::NAN; d], vec![f64::NAN; d]);
            let other: Vec<f64> = row.iter().map(|x| x * scale + added).collect();
            for (input, out) in [(&row, &mut out), (&other, &mut other_out)] {
                layernorm(
                    &mut view_mut(out, &[1, d]),
                    &view(input, &[1, d]),
                    &view(&ones, &[d]),
                    &view(&zeros, &[d]),
                    &NormOptions::with_eps(0.0),
                )
                .unwrap();
            }
            prop_assert!(out.iter().sum::<f64>().abs() < 1e-9);
            prop_assert!((out.iter().map(|x| x * x).sum::<f64>() / d as f64 - 1.0).abs() < 1e-9);
            for (a, b) in out.iter().zip(&other_out) {
                prop_assert!((a - b).abs() < 1e-9);
            }
        }
    }
}
