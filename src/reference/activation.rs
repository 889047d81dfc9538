//! Gated activations on the CPU.

use super::host::HostCheck;
use crate::{
    activation::{ActivationOptions, check_act_and_mul, halved},
    dtype::DType,
    error::Result,
    tensor::{TensorMut, TensorRef},
};

/// [`activation::silu_and_mul`](crate::activation::silu_and_mul) on the CPU:
/// `out = silu(a) · b`, where each row of `input` is `a` and then `b`.
///
/// `input` is `[.., 2 · d]` and `out` is `[.., d]`, for any `d`. Each tensor is
/// `f16`, `bf16`, `f32` or `f64`; the two 16-bit types do not mix. The options
/// change nothing.
///
/// # Errors
/// [`InvalidArgument`](crate::FlashInferError::InvalidArgument): a device,
/// dtype or shape does not fit. Nothing was written.
pub fn silu_and_mul(
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    _options: &ActivationOptions,
) -> Result<()> {
    act_and_mul("reference::silu_and_mul", |x| x / (1.0 + (-x).exp()), out, input)
}

/// [`activation::gelu_and_mul`](crate::activation::gelu_and_mul) on the CPU;
/// see [`silu_and_mul`].
///
/// # Errors
/// As [`silu_and_mul`].
pub fn gelu_and_mul(
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    _options: &ActivationOptions,
) -> Result<()> {
    act_and_mul("reference::gelu_and_mul", |x| x / 2.0 * erfc(-x / 2f64.sqrt()), out, input)
}

/// [`activation::gelu_tanh_and_mul`](crate::activation::gelu_tanh_and_mul) on
/// the CPU; see [`silu_and_mul`].
///
/// # Errors
/// As [`silu_and_mul`].
pub fn gelu_tanh_and_mul(
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
    _options: &ActivationOptions,
) -> Result<()> {
    let gelu = |x: f64| {
        let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
        x / 2.0 * (1.0 + inner.tanh())
    };
    act_and_mul("reference::gelu_tanh_and_mul", gelu, out, input)
}

fn act_and_mul(
    op: &'static str,
    activation: impl Fn(f64) -> f64,
    out: &mut TensorMut<'_>,
    input: &TensorRef<'_>,
) -> Result<()> {
    const DTYPES: [DType; 2] = [DType::F16, DType::BF16];
    const RANKS: [usize; 5] = [1, 2, 3, 4, 5];
    let check = HostCheck { op };
    check.as_kernel(|check| check_act_and_mul(check, &out.raw, &input.raw))?;
    let input = check.rows("input", input, &DTYPES, &RANKS)?;
    let mut out = check.rows_mut("out", out, &DTYPES, &RANKS)?;
    let Some(d) = halved(input.shape(), out.rows.shape()) else {
        return check
            .fail("out", format!("its shape is {:?}; input's is {:?}", out.rows.shape(), input.shape()));
    };
    let both_narrow = DTYPES.contains(&input.dtype()) && DTYPES.contains(&out.rows.dtype());
    if both_narrow && input.dtype() != out.rows.dtype() {
        return check.fail("out", "f16 and bf16 tensors do not mix".into());
    }
    let mut result = vec![0.0; d as usize];
    for at in 0..input.count() {
        let row = input.numbers(at);
        let (gate, up) = row.split_at(result.len());
        for (result, (&gate, up)) in result.iter_mut().zip(gate.iter().zip(up)) {
            *result = activation(gate) * up;
        }
        out.write(at, &result);
    }
    Ok(())
}

/// `1 − erf(x)`, to about 12 digits: a series near 0, a continued fraction
/// where it is small.
fn erfc(x: f64) -> f64 {
    if x < 0.0 {
        return 2.0 - erfc(-x);
    }
    let weight = (-x * x).exp() / std::f64::consts::PI.sqrt();
    if x < 2.5 {
        // erf(x) = 2/√π · exp(−x²) · x · Σ (2x²)ⁿ / (1 · 3 · … · (2n+1))
        let (mut term, mut sum) = (x, x);
        for n in 1..60 {
            term *= 2.0 * x * x / f64::from(2 * n + 1);
            sum += term;
        }
        1.0 - 2.0 * weight * sum
    } else {
        // erfc(x) = exp(−x²)/√π · 1/(x + (1/2)/(x + (2/2)/(x + (3/2)/(x + …))))
        weight / (1..80).rev().fold(x, |below, n| x + f64::from(n) / 2.0 / below)
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use proptest::prelude::*;

    use super::*;
    use crate::reference::testing::{refused, view, view_mut};

    type Op = fn(&mut TensorMut<'_>, &TensorRef<'_>, &ActivationOptions) -> Result<()>;
    const OPS: [Op; 3] = [silu_and_mul, gelu_and_mul, gelu_tanh_and_mul];

    fn of(op: Op, gate: f64) -> f64 {
        let mut out = [f64::NAN];
        op(&mut view_mut(&mut out, &[1]), &view(&[gate, 1.0], &[2]), &ActivationOptions::default()).unwrap();
        out[0]
    }

    #[test]
    fn known_numbers() {
        let close = |got: f64, want: f64| assert!((got - want).abs() < 1e-11, "{got}, not {want}");
        close(of(silu_and_mul, 1.0), 0.731058578630005);
        close(of(gelu_and_mul, 1.0), 0.841344746068543);
        close(of(gelu_and_mul, -1.0), -0.158655253931457);
        close(of(gelu_and_mul, -4.0), -4.0 * 3.16712418331199e-5);
        close(of(gelu_tanh_and_mul, 1.0), 0.841191990608303);
        for op in OPS {
            assert_eq!(of(op, 0.0), 0.0);
            close(of(op, 30.0), 30.0);
            close(of(op, -800.0), 0.0);
        }
    }

    #[test]
    fn halves_are_multiplied_row_by_row() {
        let input = [30.0f64, 40.0, 2.0, 3.0, 50.0, 60.0, 4.0, 5.0];
        for op in OPS {
            let mut out = [f64::NAN; 4];
            op(&mut view_mut(&mut out, &[2, 1, 2]), &view(&input, &[2, 1, 4]), &ActivationOptions::default())
                .unwrap();
            let expected = [60.0, 120.0, 200.0, 300.0];
            assert!(out.iter().zip(expected).all(|(out, expected)| (out - expected).abs() < 1e-9), "{out:?}");
        }
    }

    #[test]
    fn wrong_input_is_refused() {
        let options = ActivationOptions::default();
        let (numbers, halves, integers) = ([1.0f32; 8], [f16::ONE; 8], [1i32; 8]);
        for op in OPS {
            let mut out = [bf16::ZERO; 4];
            let mut run = |input: TensorRef<'_>, shape: &[usize], expected| {
                refused(op(&mut view_mut(&mut out, shape), &input, &options), expected);
            };
            run(view(&integers, &[2, 4]), &[2, 2], "input");
            run(view(&numbers, &[2, 4]), &[1, 4], "out");
            run(view(&numbers, &[2, 4]), &[4], "out");
            run(view(&numbers[..6], &[2, 3]), &[2, 1], "out");
            run(view(&halves, &[2, 4]), &[2, 2], "out");
            assert_eq!(out, [bf16::ZERO; 4]);
        }
    }

    proptest! {
        /// Both forms of `erfc` agree where they meet, and it is symmetric.
        #[test]
        fn erfc_is_smooth(x in 0.0f64..5.0) {
            prop_assert!((erfc(x) + erfc(-x) - 2.0).abs() < 1e-12);
            let (step, slope) = (1e-4, -2.0 / std::f64::consts::PI.sqrt() * (-x * x).exp());
            let difference = (erfc(x + step) - erfc(x - step)) / (2.0 * step);
            prop_assert!((difference - slope).abs() < 1e-7);
        }

        /// The approximation by `tanh` is one.
        #[test]
        fn gelus_agree(x in -20.0f64..20.0) {
            prop_assert!((of(gelu_and_mul, x) - of(gelu_tanh_and_mul, x)).abs() < 1e-3);
        }
    }
}
